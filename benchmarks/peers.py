"""Runs another project's quantizer, in its own virtual environment: `python peers.py NAME FLOAT.onnx FEEDS.npz TARGET`.

    static    onnxruntime's quantize_static: MatMul, Gemm and Conv, per channel, U8S8, MinMax; pip install onnxruntime onnx
    modelopt  nvidia-modelopt's ONNX int8, calibration max; pip install torch==2.13.0 "nvidia-modelopt[onnx]"
    nncf      NNCF through OpenVINO, transformer preset; pip install nncf openvino

FEEDS holds arrays of equal length, with one entry per network call.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def folded(model: Path, target: Path) -> Path:
    """Write a graph whose weights are stored as its MatMuls read them, as the preprocessing of each peer would do it.

    The float graph shares the checkpoint's weights and transposes them. Peers do not take the result for a weight: NNCF leaves
    such a linear float, and quantize_static gives it one scale.
    """
    import onnx

    proto = onnx.load(model)
    weights = {item.name: item for item in proto.graph.initializer}
    for node in [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        transposed = np.transpose(onnx.numpy_helper.to_array(weights[node.input[0]]), node.attribute[0].ints)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(transposed), node.output[0]))
        proto.graph.node.remove(node)
    names = {name for node in proto.graph.node for name in node.input}
    for index in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[index].name not in names:
            del proto.graph.initializer[index]
    onnx.save(proto, target, save_as_external_data=True, location=f"{target.name}.data")
    return target


def static(model: Path, feeds: list[dict[str, Any]], target: Path) -> None:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, create_calibrator, quantize_static
    from onnxruntime.quantization.calibrate import save_tensors_data

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    operators, ranges = ["MatMul", "Gemm", "Conv"], model.with_name("ranges.json")
    augmented = model.with_name("augmented.onnx")
    calibrator = create_calibrator(model, operators, str(augmented), use_external_data_format=True)
    # In the default order a session computes all ranges at the end of a call, and every activation stays in memory until then.
    options = onnxruntime.SessionOptions()
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    calibrator.infer_session = onnxruntime.InferenceSession(augmented, options, providers=["CPUExecutionProvider"])
    calibrator.collect_data(Reader())
    save_tensors_data(calibrator.compute_data(), ranges)
    del calibrator
    quantize_static(
        model,
        target,
        None,
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        calibration_cache_path=ranges,
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
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        graph = folded(model, Path(folder) / "model.onnx")
        {"static": static, "modelopt": modelopt, "nncf": nncf}[name](graph, calls, target)


if __name__ == "__main__":
    main()
