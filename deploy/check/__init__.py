"""Predict how a target will run the quantized operators of an ONNX file, without building anything."""

from .canonical import CanonicalError
from .findings import Finding, Target, check
from .gemm import Verdict
from .model_file import ModelFileError, read_model

__all__ = ["CanonicalError", "Finding", "ModelFileError", "Target", "Verdict", "check", "read_model"]
