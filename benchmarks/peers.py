"""Runs another project's quantizer, in its own virtual environment: `python peers.py NAME FLOAT.onnx FEEDS.npz TARGET`.

    static    onnxruntime's quantize_static: MatMul, Gemm and Conv, per channel, U8S8, MinMax; pip install onnxruntime onnx
    modelopt  nvidia-modelopt's ONNX int8, calibration max; pip install torch==2.13.0 "nvidia-modelopt[onnx]"
    nncf      NNCF through OpenVINO, transformer preset; pip install nncf openvino

FEEDS holds arrays of equal length, with one entry per network call.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np


def static(model: Path, feeds: list[dict[str, Any]], target: Path, *, large: bool = False) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    quantize_static(
        model,
        target,
        Reader(),
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
    )


def modelopt(model: Path, feeds: list[dict[str, Any]], target: Path) -> None:
    # It takes one array per input and cuts it into calls by the graph's batch, so the graph gets the batch of a call.
    import onnx
    from modelopt.onnx.quantization import quantize

    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if first.dim_param or first.dim_value != 1:
            first.ClearField("dim_param")
            first.dim_value = len(feeds[0]["hidden_states"])
    fixed = target.with_name("fixed.onnx")
    onnx.save(proto, fixed)
    arrays = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    quantize(
        str(fixed),
        quantize_mode="int8",
        calibration_data=arrays,
        calibration_method="max",
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(target),
    )


def nncf(model: Path, feeds: list[dict[str, Any]], target: Path) -> None:
    import nncf as library
    import openvino

    network = openvino.Core().read_model(model)
    quantized = library.quantize(
        network,
        library.Dataset(feeds),
        model_type=library.ModelType.TRANSFORMER,
        subset_size=len(feeds),
        fast_bias_correction=True,
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def main() -> None:
    name, model, feeds, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    arrays = dict(np.load(feeds))
    calls = [{key: value[i] for key, value in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
    {"static": static, "modelopt": modelopt, "nncf": nncf}[name](model, calls, target)


if __name__ == "__main__":
    main()
