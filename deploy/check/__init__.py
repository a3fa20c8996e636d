"""What a target will do with the quantized operators of an ONNX file, before anything is built."""

from .canonical import CanonicalError
from .findings import Finding, Target, check
from .gemm import Verdict
from .model_file import ModelFileError, read_model

__all__ = ["CanonicalError", "Finding", "ModelFileError", "Target", "Verdict", "check", "read_model"]
