"""Mutates a model folder: configs, scheduler, weights in safetensors and in pickles, and their indexes."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import Case, Format
from .materials import EXPORT, LAYOUTS
from .values import mutate_bytes, mutate_json, mutate_path

WHOLE = 0.08
"""Share of the inputs whose export runs to its end."""
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "DDIMInverseScheduler", "LCMScheduler",
    "TCDScheduler", "UnCLIPScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler",
    "CogVideoXDPMScheduler", "CogVideoXDDIMScheduler", "RePaintScheduler", "ScoreSdeVeScheduler",
    "CMStochasticIterativeScheduler", "SASolverScheduler", "IPNDMScheduler", "HeliosDMDScheduler",
)  # fmt: skip


class Payload:
    """A pickle that writes outside its folder if anything loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo owned > ../guard/owned",)


def export(rng: random.Random, work: Path, mutation: str, *words: str, whole: float = WHOLE) -> Case:
    """Return a case that exports the model in `work`, to its end for a share of the inputs."""
    goes_on = rng.random() < whole
    return Case(["--model", "model", *EXPORT, "-o", "out", *words], mutation, goes_on, lambda: equal_to_diffusers(work))


def equal_to_diffusers(work: Path) -> str:
    """Return the difference of an export's float graph from the model that diffusers loads from the same folder."""
    import numpy as np
    import onnxruntime as ort
    import torch
    from diffusers import DiTTransformer2DModel

    folder = work / "model" / "transformer"
    folder = folder if folder.is_dir() else work / "model"
    safe = any(folder.glob("*.safetensors"))  # without it diffusers looks for no pickles in shards
    model = DiTTransformer2DModel.from_pretrained(folder, use_safetensors=safe).float().eval()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(work / "out" / "float" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    random_ = np.random.default_rng(0)
    size = model.config.sample_size
    latents = random_.standard_normal((2, model.config.in_channels, size, size)).astype(np.float32)
    labels = np.asarray([0, 1 % model.config.num_embeds_ada_norm])
    steps = np.full([1 if session.get_inputs()[1].shape == [1] else 2], 500)
    output = session.run(None, {"hidden_states": latents, "timestep": steps, "class_labels": labels})[0]
    with torch.no_grad():
        expected = model(torch.from_numpy(latents), torch.full((2,), 500), torch.from_numpy(labels)).sample.numpy()
    noise = np.square(output.astype(np.float64) - expected).sum() / max(float(np.square(expected).sum()), 1e-30)
    return "" if noise < 1e-6 else f"silent: the float graph is {-10 * np.log10(noise):.0f} dB from diffusers' own model"


def copy_model(rng: random.Random, materials: Path, work: Path, layouts: tuple[str, ...] = LAYOUTS) -> Path:
    """Copy one layout to `work/model`."""
    return Path(shutil.copytree(materials / rng.choice(layouts), work / "model"))


def json_of(name: str, layouts: tuple[str, ...] = ("plain", "published")) -> Callable[..., Case]:
    """Mutate a JSON file of a model folder."""

    def mutate(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
        file = copy_model(rng, materials, work, layouts) / name
        if rng.random() < 0.06:
            return export(rng, work, mutate_path(rng, rng.choice((file, file.parent)) if "/" in name else file, guard))
        data, mutation = mutate_json(rng, file.read_bytes())
        file.write_bytes(data)
        return export(rng, work, mutation)

    return mutate


def scheduler(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate scheduler_config.json, with any class of diffusers."""
    if rng.random() < 0.5:
        return json_of("scheduler/scheduler_config.json")(rng, materials, work, guard)
    import diffusers

    file = copy_model(rng, materials, work, ("plain",)) / "scheduler" / "scheduler_config.json"
    name = rng.choice([name for name in SCHEDULERS if hasattr(diffusers, name)])
    config = dict(getattr(diffusers, name)().config)
    config = {**json.loads(json.dumps(config, default=str)), "_class_name": name}
    data, mutation = json.dumps(config).encode(), "defaults"
    if rng.random() < 0.8:
        data, mutation = mutate_json(rng, data)
    file.write_bytes(data)
    return export(rng, work, f"{name}: {mutation}")


def decoder(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate the VAE, which only a Triton repository reads. The other stages are finished."""
    model = copy_model(rng, materials, work, ("plain",))
    shutil.copytree(materials / "out", work / "out", symlinks=True)
    recipe = work / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(materials / "plain"), str(model)))
    file = model / "vae" / rng.choice(("config.json", "config.json", "diffusion_pytorch_model.safetensors"))
    kind = rng.random()
    if kind < 0.1:
        mutation = mutate_path(rng, file, guard)
    elif file.suffix == ".json":
        data, mutation = mutate_json(rng, file.read_bytes())
        file.write_bytes(data)
    else:
        mutation = mutate_header(rng, file)
    return Case(["triton", "out"], f"{file.name}: {mutation}")


def mutate_header(rng: random.Random, file: Path) -> str:
    """Change a safetensors file: its header's JSON, its length field, its bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header, mutation = mutate_json(rng, header)
        mutant = len(header).to_bytes(8, "little") + header + body
    elif kind < 0.75:
        field = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, 10**8))
        mutant, mutation = field.to_bytes(8, "little") + data[8:], f"length {field}"
    elif kind < 0.9:
        mutant, mutation = mutate_bytes(rng, data, length)
    else:
        body, mutation = mutate_bytes(rng, body)
        mutant = data[: 8 + length] + body
    file.write_bytes(mutant)
    return mutation


def safetensors(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate safetensors files, whole or in shards."""
    folder = copy_model(rng, materials, work, ("plain", "sharded")) / "transformer"
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    kind = rng.random()
    if kind < 0.08:
        mutation = mutate_path(rng, file, guard)
    elif kind < 0.7:
        mutation = mutate_header(rng, file)
    else:
        mutation = mutate_content(rng, file)
    return export(rng, work, mutation)


def mutate_content(rng: random.Random, file: Path) -> str:
    """Write a valid safetensors file with other tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    content, mutation = _tensors(rng, state)
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else state.items():
        plain = isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        if plain and not value.is_meta and value.numel() < 1 << 20:
            tensors[name] = value.detach().contiguous().clone()
    if rng.random() < 0.3:
        dtype = rng.choice((torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float64))
        tensors, mutation = {name: value.to(dtype) for name, value in tensors.items()}, f"{mutation}, all {dtype}"
    save_file(tensors, file, metadata=rng.choice((None, {"format": "pt"}, {"format": "tf"}, {"x": "y"})))
    return mutation


def index(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate an index of shards: files outside the folder, pickles under other names, lost tensors."""
    folder = copy_model(rng, materials, work, ("sharded", "sharded_bin")) / "transformer"
    (file,) = folder.glob("*.index.json")
    kind = rng.random()
    if kind < 0.1:
        return export(rng, work, mutate_path(rng, file, guard))
    if kind < 0.6:
        data, mutation = mutate_json(rng, file.read_bytes())
        file.write_bytes(data)
        return export(rng, work, mutation)
    document = json.loads(file.read_bytes())
    names = document["weight_map"]
    key = rng.choice(sorted(names))
    target = rng.choice(("x.bin", "../x.bin", "/dev/zero", "", ".", "..", "a/b.safetensors", "x.pt", "none.safetensors", "\0"))
    for name in [key] if rng.random() < 0.5 else sorted(names):
        names[name] = target
    if "x." in target:
        (folder / target).write_bytes(pickle.dumps(Payload()))
    file.write_text(json.dumps(document))
    return export(rng, work, f"shard {target!r}")


def _tensors(rng: random.Random, state: dict[str, Any]) -> tuple[Any, str]:
    """Return tensors that a checkpoint may hold in place of the right ones."""
    import torch

    name = rng.choice(sorted(state))
    value = state[name]
    kinds: dict[str, Callable[[], Any]] = {
        "a payload": lambda: {**state, name: Payload()},
        "only a payload": Payload,
        "a list": lambda: list(state.values()),
        "in a state_dict": lambda: {"state_dict": state},
        "a tensor": lambda: value,
        "a number": lambda: {**state, name: 3},
        "a name that is a number": lambda: {**state, 7: value},
        "half precision": lambda: {key: item.half() for key, item in state.items()},
        "double precision": lambda: {key: item.double() for key, item in state.items()},
        "integers": lambda: {**state, name: value.int()},
        "complex": lambda: {**state, name: value.to(torch.complex64)},
        "sparse": lambda: {**state, name: value.to_sparse()},
        "of no storage": lambda: {**state, name: value.to("meta")},
        "expanded": lambda: {**state, name: torch.zeros(1).expand(1 << 20, 1 << 20)},
        "turned": lambda: {**state, name: value.t() if value.ndim == 2 else value.flip(0)},
        "another shape": lambda: {**state, name: torch.zeros(3, 5)},
        "not a number": lambda: {**state, name: value * float("nan")},
        "infinite": lambda: {**state, name: value * float("inf")},
        "zeros": lambda: {**state, name: value * 0},
        "large": lambda: {**state, name: value * 1e30},
        "missing": lambda: {key: item for key, item in state.items() if key != name},
        "one more": lambda: {**state, "more.weight": value},
        "nothing": dict,
        "parameters": lambda: {key: torch.nn.Parameter(item) for key, item in state.items()},
    }
    kind = rng.choice(sorted(kinds))
    return kinds[kind](), f"{kind} ({name})"


def binary(rng: random.Random, materials: Path, work: Path, guard: Path) -> Case:
    """Mutate .bin checkpoints: their bytes, their pickled objects, the kind of archive."""
    import torch

    folder = copy_model(rng, materials, work, ("published", "sharded_bin")) / "transformer"
    file = rng.choice(sorted(folder.glob("*.bin")))
    kind = rng.random()
    if kind < 0.08:
        return export(rng, work, mutate_path(rng, file, guard))
    if kind < 0.5:
        data, mutation = mutate_bytes(rng, file.read_bytes(), rng.choice((None, 200, 4000)))
        file.write_bytes(data)
        return export(rng, work, mutation)
    state = torch.load(file, weights_only=True)
    content, mutation = _tensors(rng, state)
    if kind < 0.55:
        file.write_bytes(pickle.dumps(content))
        return export(rng, work, f"a bare pickle of {mutation}")
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    return export(rng, work, mutation)


FORMATS = (
    Format("transformer config", 14, json_of("transformer/config.json"), accepts=(0, 3, 4)),
    Format("scheduler config", 16, scheduler, accepts=(0, 3, 4)),
    Format("model_index", 3, json_of("model_index.json"), accepts=(0, 3, 4)),
    Format("VAE", 5, decoder),
    Format("safetensors", 12, safetensors, accepts=(0, 3, 4)),
    Format("index of shards", 5, index, accepts=(0, 3, 4)),
    Format(".bin checkpoint", 8, binary, accepts=(0, 3, 4)),
)
