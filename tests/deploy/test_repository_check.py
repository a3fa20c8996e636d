"""Every fault that a repository's files can show: each is made in an exported repository, which without it is clean."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import server

from dq_export.deploy.triton.check import check_repository
from dq_export.deploy.triton.model_folder import Fault

Change = Callable[[Path], object]
DENOISER, PIPELINE = "denoiser/config.pbtxt", "pipeline/config.pbtxt"
CALL = "pipeline/1/network.json"


def edit(file: str, old: str, new: str) -> Change:
    """Replace the first match of a regular expression, which must be there."""

    def change(repository: Path) -> None:
        text, count = re.subn(old, new, (repository / file).read_text(), count=1, flags=re.DOTALL)
        assert count == 1
        (repository / file).write_text(text)

    return change


def add(file: str, text: str) -> Change:
    return lambda repository: (repository / file).write_text((repository / file).read_text() + text)


def remove(path: str) -> Change:
    def change(repository: Path) -> None:
        target = repository / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def set_parameter(key: str, value: str) -> Change:
    return edit(PIPELINE, rf'(key: "{key}"\s+value {{\s+string_value: )"[^"]*"', rf'\1"{value}"')


def fixed_batch(repository: Path) -> None:
    path = repository / "denoiser" / "1" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path.write_bytes(model.SerializeToString())


def escaping_data(repository: Path) -> None:
    path = repository / "denoiser" / "1" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(pair for item in model.graph.initializer for pair in item.external_data if pair.key == "location")
    entry.value = "../../secret.data"
    path.write_bytes(model.SerializeToString())


def cut_short(repository: Path) -> None:
    path = repository / "denoiser" / "1" / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:1000])


def pickled_tables(repository: Path) -> None:
    np.save(repository / "pipeline" / "1" / "schedules.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def linked_out(repository: Path) -> None:
    path = repository / "denoiser" / "1" / "model.onnx.data"
    outside = repository.parent / "outside.data"
    path.rename(outside)
    path.symlink_to(outside)


SERVER_REFUSES: dict[str, tuple[Change, str]] = {
    "misspelt field": (add(DENOISER, "\nmax_batch_sizes: 3"), 'no field named "max_batch_sizes"'),
    "unknown value": (edit(DENOISER, "TYPE_FP32", "TYPE_FLOAT"), "TYPE_FLOAT"),
    "name is not the folder's": (edit(DENOISER, 'name: "denoiser"', 'name: "network"'), "name: 'network' is not the folder's"),
    "no version": (remove("denoiser/1"), "no version folder"),
    "preferred above greatest batch": (
        edit(DENOISER, "dynamic_batching {", "dynamic_batching { preferred_batch_size: [ 4, 32 ]"),
        "preferred_batch_size 32 is above max_batch_size 16",
    ),
    "warm-up without an input": (
        edit(DENOISER, r'inputs {\s+key: "timestep".*?}\s+}', ""),
        "model_warmup 'batch 1': input 'timestep' is missing",
    ),
    "warm-up of another shape": (
        edit(DENOISER, r'(model_warmup.*?key: "hidden_states".*?dims: 1\s+dims: )16', r"\g<1>17"),
        "model_warmup 'batch 1': 'hidden_states' has dims [1, 17, 16], the input [1, 16, 16]",
    ),
    "warm-up of another type": (
        edit(DENOISER, r'(model_warmup.*?key: "hidden_states".*?)TYPE_FP32', r"\1TYPE_FP16"),
        "model_warmup 'batch 1': 'hidden_states' has another data_type",
    ),
    "warm-up above the greatest batch": (
        edit(DENOISER, "batch_size: 1$|batch_size: 16\n  inputs", "batch_size: 17\n  inputs"),
        "batch_size above max_batch_size",
    ),
    "unequal reshape": (edit(DENOISER, r"reshape {\s+}", "reshape { shape: [ 2 ] }"), "differ in elements"),
    "wrong output name": (edit(DENOISER, 'name: "sample"', 'name: "noise"'), "output 'noise' is not in the graph; expected"),
    "wrong input name": (
        edit(DENOISER, 'name: "class_labels"', 'name: "labels"'),
        "the graph's input 'class_labels' is not listed",
    ),
    "external data missing": (remove("denoiser/1/model.onnx.data"), "external data 'model.onnx.data' is missing"),
    "external data cut short": (cut_short, "external data 'model.onnx.data' is cut short: 1000 of"),
    "no graph": (remove("denoiser/1/model.onnx"), "1/model.onnx is missing or empty"),
    "thread count in words": (
        add(DENOISER, parameter("intra_op_thread_count", "many")),
        "intra_op_thread_count 'many' is not a whole number",
    ),
    "a version that is not there": (add(DENOISER, "version_policy { specific { versions: [ 3 ] } }"), "there is no version 3"),
}
"""What a load on the server fails with, too: the core's own checks, and those that the stand-in backend makes."""

UNSEEN: dict[str, tuple[Change, str, str]] = {
    "no config": (remove(DENOISER), "error", "no config.pbtxt"),
    "no outputs": (edit(DENOISER, r"output {.*?}\n", ""), "error", "input or output is missing"),
    "no backend": (edit(DENOISER, 'backend: "onnxruntime"', ""), "error", "backend: '' names none"),
    "another type than the graph's": (
        edit(DENOISER, r'name: "timestep"\s+data_type: TYPE_INT64', 'name: "timestep" data_type: TYPE_INT32'),
        "error",
        "input 'timestep' is TYPE_INT32, in the graph TYPE_INT64",
    ),
    "other dims than the graph's": (
        edit(DENOISER, r"dims: 16\s+dims: 16", "dims: 16 dims: 8"),
        "error",
        "has dims [1, 16, 8], in the graph [1, 16, 16]",
    ),
    "a number a sample without reshape": (
        edit(DENOISER, r"reshape {\s+}", ""),
        "error",
        "'timestep' has dims [1], in the graph []",
    ),
    "an input twice": (
        add(DENOISER, 'input { name: "timestep" data_type: TYPE_INT64 dims: [ 1 ] reshape { } }'),
        "error",
        "'timestep' is listed twice",
    ),
    "a graph of fixed batch": (fixed_batch, "error", "the graph's first dimension is 2, not a free batch"),
    "external data elsewhere": (escaping_data, "error", "external data '../../secret.data' lies outside"),
    "a link out of the repository": (linked_out, "error", "denoiser/1/model.onnx.data is a link out of the repository"),
    "a path as file name": (add(DENOISER, 'default_model_filename: "../model.onnx"'), "error", "'../model.onnx' is a path"),
    "a pickle": (
        lambda r: (r / "pipeline" / "1" / "weights.pkl").write_bytes(b"x"),
        "warning",
        "weights.pkl: a pickle can run code",
    ),
    "an unknown parameter": (
        add(DENOISER, parameter("intra_op_threads", "2")),
        "warning",
        "backend onnxruntime ignores 'intra_op_threads'",
    ),
    "no instance count": (
        edit(DENOISER, r"instance_group {.*?}\n", ""),
        "warning",
        "no count; on a processor that is two instances",
    ),
    "TensorRT on the processor": (
        add(DENOISER, 'optimization { execution_accelerators { gpu_execution_accelerator : [ { name : "tensorrt" } ] } }'),
        "warning",
        "'tensorrt' is ignored on KIND_CPU",
    ),
    "an unknown accelerator": (
        add(DENOISER, 'optimization { execution_accelerators { gpu_execution_accelerator : [ { name : "tensorr" } ] } }'),
        "error",
        "'tensorr' is unknown",
    ),
    "OpenVINO's accelerator": (
        add(DENOISER, 'optimization { execution_accelerators { cpu_execution_accelerator : [ { name : "openvino" } ] } }'),
        "warning",
        "'openvino' loads only where the server was built with it",
    ),
    "a plan on the processor": (edit(DENOISER, "onnxruntime", "tensorrt"), "error", "a plan cannot run on KIND_CPU"),
    "a plan that is not there": (edit(DENOISER, "onnxruntime", "tensorrt"), "error", "1/model.plan is missing or empty"),
    "a queue delay in a loop": (
        edit(
            DENOISER,
            r"max_queue_delay_microseconds: 0|dynamic_batching {",
            "dynamic_batching { max_queue_delay_microseconds: 20000",
        ),
        "warning",
        "every step of pipeline, pipeline_stream waits 20000",
    ),
    "batching without a batch": (
        edit(DENOISER, "max_batch_size: 16", "max_batch_size: 0"),
        "error",
        "dynamic_batching without max_batch_size",
    ),
    "BF16 at the edge": (edit(DENOISER, "TYPE_FP32", "TYPE_BF16"), "warning", "TYPE_BF16, which servers before 26.03 refuse"),
    "no ONNX": (
        lambda r: (r / "denoiser" / "1" / "model.onnx").write_bytes(b"not onnx at all"),
        "error",
        "1/model.onnx is not ONNX",
    ),
    "a broken program": (add("pipeline/1/model.py", "\ndef broken(:\n"), "error", "1/model.py: invalid syntax"),
    "no program": (edit("pipeline/1/model.py", "class TritonPythonModel", "class Model"), "error", "no class TritonPythonModel"),
    "a call to nobody": (
        add("pipeline/1/model.py", '\ndef f(pb): pb.InferenceRequest(model_name="vae", inputs=[])\n'),
        "error",
        "calls model 'vae', which is not in the repository",
    ),
    "no denoiser": (remove("denoiser"), "error", "denoiser 'denoiser' is not in the repository"),
    "no decoder": (
        edit(PIPELINE, r'(key: "decoder"\s+value {)', r'\1 string_value: "vae"'),
        "error",
        "decoder 'vae' is not in the repository",
    ),
    "a missing parameter": (
        edit(PIPELINE, r'parameters {\s+key: "classes".*?}\s+}\n', ""),
        "error",
        "parameters: 'classes' is missing",
    ),
    "a parameter in words": (set_parameter("max_requests", "many"), "error", "max_requests 'many' is not a whole number"),
    "a parameter of ours misspelt": (add(PIPELINE, parameter("max_row", "4")), "warning", "'max_row' is not read"),
    "calls above the denoiser's batch": (
        set_parameter("max_rows", "32"),
        "error",
        "max_rows 32 is above the denoiser's max_batch_size 16",
    ),
    "calls that others can join": (set_parameter("max_rows", "15"), "warning", "max_rows 15 is below"),
    "pictures above the batch": (
        edit(PIPELINE, "max_batch_size: 8", "max_batch_size: 9"),
        "error",
        "max_batch_size: 9 guided pictures are more than max_rows 16",
    ),
    "a default size that is not drawn": (
        set_parameter("height", "24"),
        "error",
        "parameters: height 24: expected 16, the only height that this model was exported for",
    ),
    "sizes between steps": (set_parameter("size_step", "3"), "error", "height 16 is not a multiple of size_step 3"),
    "a scheduler without a table": (
        set_parameter("scheduler", "pndm"),
        "error",
        "scheduler 'pndm': expected ddim, dpmsolver++, euler",
    ),
    "more steps than tables": (
        set_parameter("num_inference_steps", "101"),
        "error",
        "num_inference_steps 101: expected 1 to 100",
    ),
    "no tables": (remove("pipeline/1/schedules.npy"), "error", "schedules.npy: no such file"),
    "tables by pickle": (pickled_tables, "error", "expected float64 tables in numpy's format"),
    "tables of others": (
        set_parameter("schedulers", "ddim,euler"),
        "error",
        "expected 2 tables of 9 columns, found (3, 5050, 9)",
    ),
    "no description of the call": (remove(CALL), "error", "network.json: no such file"),
    "a description that is none": (edit(CALL, "int64", "int8"), "error", "expected timestep int64 or float32"),
    "a condition that no request holds": (
        edit(CALL, '"class_labels": "class_labels"', '"class_labels": "label"'),
        "error",
        "input 'label' is missing, which 1/network.json names",
    ),
    "a value of no size": (
        edit(CALL, r'"size_values": \{\}', '"size_values": {"time_ids": ["depth"]}'),
        "error",
        "expected size_values as lists of numbers, height, width, aspect",
    ),
    "a value for no input": (
        edit(CALL, r'"size_values": \{\}', '"size_values": {"time_ids": ["height", 0]}'),
        "error",
        "the denoiser has no input 'time_ids', which 1/network.json names",
    ),
    "a tokenizer elsewhere": (edit(CALL, r'"tokenizers": \[\]', '"tokenizers": ["../t.json"]'), "error", "in the same folder"),
    "a tokenizer that is not there": (
        edit(CALL, r'"tokenizers": \[\]', '"tokenizers": ["t.json"]'),
        "error",
        "t.json: no such file",
    ),
    "tokenizers without an encoder": (
        edit(CALL, r'"tokenizers": \[\]', '"tokenizers": ["network.json"]'),
        "error",
        "text_encoder and the tokenizers of 1/network.json do not fit",
    ),
    "no text encoder": (
        edit(PIPELINE, r'(key: "text_encoder"\s+value {)', r'\1 string_value: "t5"'),
        "error",
        "text_encoder 't5' is not in the repository",
    ),
    "an environment of this machine": (
        add(PIPELINE, parameter("EXECUTION_ENV_PATH", "/opt/env")),
        "warning",
        "EXECUTION_ENV_PATH '/opt/env' is a path of this machine",
    ),
    "a program's input of any size": (
        edit(PIPELINE, r'(name: "class_labels"\s+data_type: TYPE_INT64\s+dims: )1', r"\g<1>-1"),
        "error",
        "input 'class_labels' has dims [-1]: a request may ask for any size, and one of a few bytes can end the program",
    ),
    "a network's input of any size": (
        edit(DENOISER, r'(name: "hidden_states"\s+data_type: TYPE_FP32\s+dims: )1', r"\g<1>-1"),
        "warning",
        "input 'hidden_states' has dims [-1, 16, 16]: a request may ask for any size",
    ),
    "a health that asks nobody": (
        remove("pipeline_stream"),
        "error",
        "model 'pipeline_stream' is not in the repository, so health always fails",
    ),
    "a guidance scale in words": (
        set_parameter("guidance_scale", "much"),
        "error",
        "guidance_scale 'much' is not a finite number",
    ),
    "an infinite guidance scale": (
        set_parameter("guidance_scale", "inf"),
        "error",
        "guidance_scale 'inf' is not a finite number",
    ),
    "digits of others": (set_parameter("max_rows", "²"), "error", "max_rows '²' is not a whole number"),
    "a negative batch": (edit(DENOISER, "max_batch_size: 16", "max_batch_size: -1"), "error", "max_batch_size: -1 is below 0"),
    "no such type": (edit(PIPELINE, "TYPE_INT64", "99"), "error", "data_type is 99, which is not a type"),
    "no such kind": (edit(PIPELINE, "KIND_CPU", "99"), "error", "kind is not the number of a kind"),
    "a dimension of none": (
        edit(PIPELINE, r'(name: "class_labels"\s+data_type: TYPE_INT64\s+dims: )1', r"\g<1>0"),
        "error",
        "'class_labels': dims [0]",
    ),
    "an ensemble of nobody": (
        lambda r: ensemble(r, "vae"),
        "error",
        "ensemble_scheduling: model 'vae' is not in the repository",
    ),
    "an ensemble with a wrong name": (lambda r: ensemble(r, "denoiser"), "error", "'denoiser' has no input 'x'"),
}
"""What the server accepts in silence, what only the real backend refuses, and what shows when a request comes."""


def ensemble(repository: Path, target: str) -> None:
    (repository / "both" / "1").mkdir(parents=True)
    (repository / "both" / "config.pbtxt").write_text(f"""
        name: "both" platform: "ensemble" max_batch_size: 1
        input {{ name: "x" data_type: TYPE_FP32 dims: [ 1 ] }} output {{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }}
        ensemble_scheduling {{ step {{ model_name: "{target}" model_version: -1
          input_map {{ key: "x" value: "x" }} output_map {{ key: "sample" value: "y" }} }} }}""")


def messages_of(faults: list[Fault], severity: str) -> str:
    return "\n".join(f"{item.problem}; {item.fix}" for item in faults if item.severity == severity)


def test_an_exported_repository_has_no_faults(exported: Path) -> None:
    assert check_repository(exported / "triton") == []


def test_a_folder_without_models_is_a_fault(tmp_path: Path) -> None:
    assert "no model folders" in messages_of(check_repository(tmp_path), "error")


@pytest.mark.parametrize(("change", "severity", "text"), UNSEEN.values(), ids=UNSEEN)
def test_faults_that_the_files_show(repository: Path, change: Change, severity: str, text: str) -> None:
    change(repository)
    assert text in messages_of(check_repository(repository), severity)


def test_the_check_finds_faults_that_the_server_refuses(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    if server.missing():
        pytest.skip(server.missing())
    folder = tmp_path_factory.mktemp("faults")
    live = folder / "repository"
    live.mkdir()
    unfound, accepted = [], []
    with server.serving(live, folder, "--model-control-mode=explicit") as running:
        for name, (change, text) in SERVER_REFUSES.items():
            shutil.rmtree(live)
            shutil.copytree(exported / "triton", live)
            change(live)
            actual = messages_of(check_repository(live), "error")
            if text not in actual:
                unfound.append(f"{name}: {actual}")
            if loads(running, "denoiser"):
                accepted.append(name)
    assert unfound == []
    assert accepted == []


def loads(running: server.Server, model: str) -> bool:
    """Whether the server loads a model; it is unloaded again."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    client: Any = grpc.InferenceServerClient(running.grpc)
    try:
        client.load_model(model)
        client.unload_model(model)
    except InferenceServerException:
        return False
    finally:
        client.close()
    return True
