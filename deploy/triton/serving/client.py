"""Requests pictures from a Triton server of this repository.

    pip install "tritonclient[grpc]" numpy pillow
    python client.py --labels 0,1,2,3 --steps 20 --seed 7 -o pictures.png
    python client.py --labels 3 --preview-every 5 -o picture.png      # picture-5.png, picture-10.png, ..., picture.png
    python client.py --prompt "a house" --prompt "a tree"              # for a model that takes prompts
    python client.py --embeddings encoded.npz                          # for one that takes embeddings: arrays by input name

Without a decoder the server returns `latents` alone: -o latents.npy.
"""

from __future__ import annotations

import argparse
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np


def ask(url: str, inputs: dict[str, Any], *, seconds: float) -> Any:
    """Send one request and yield (step, outputs by name) of every response. The last one has step 0.

    Args:
        inputs: `class_labels`, `prompt` or embeddings, one per picture, and any optional inputs: `seed` and `latents` have one
            value per picture, the others one value for all. A request with `preview_every` goes to the streaming model.
        seconds: the longest wait for a response.

    Raises:
        tritonclient.utils.InferenceServerException: the server returned an error.
    """
    import tritonclient.grpc as grpc

    kinds = {"class_labels": np.int64, "seed": np.uint64, "num_inference_steps": np.int32, "guidance_scale": np.float32}
    kinds |= {"preview_every": np.int32, "height": np.int32, "width": np.int32}
    names = {np.int64: "INT64", np.uint64: "UINT64", np.int32: "INT32", np.float32: "FP32"}
    tensors, pictures = [], len(next(iter(inputs.values())))
    for name, value in inputs.items():
        if name in ("prompt", "negative_prompt", "scheduler"):
            texts = [value] * pictures if isinstance(value, str) else value
            array, kind = np.array([[text.encode()] for text in texts], dtype=np.object_), "BYTES"
        elif name not in kinds:  # latents and embeddings
            array, kind = np.asarray(value, dtype=np.float32), "FP32"
        else:
            column = np.asarray(value, dtype=kinds[name]).reshape(-1, 1)
            array, kind = np.ascontiguousarray(np.broadcast_to(column, (pictures, 1))), names[kinds[name]]
        tensors.append(grpc.InferInput(name, list(array.shape), kind))
        tensors[-1].set_data_from_numpy(array)
    client = grpc.InferenceServerClient(url)
    try:
        if "preview_every" not in inputs:
            result = client.infer("pipeline", tensors, client_timeout=seconds)
            yield 0, _outputs(result)
            return
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer("pipeline_stream", tensors)
        step = -1
        while step != 0:
            result, error = answers.get(timeout=seconds)
            if error:
                raise error
            outputs = _outputs(result)
            step = int(outputs["step"][0, 0])
            yield step, outputs
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def save(path: Path, outputs: dict[str, Any]) -> None:
    """Save the pictures side by side as PNG, or the latents as .npy."""
    if path.suffix == ".npy" or "images" not in outputs:
        np.save(path.with_suffix(".npy"), outputs["latents"])
        return
    from PIL import Image

    row = np.concatenate(list(outputs["images"]), axis=1)
    Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row).save(path)


def _outputs(result: Any) -> dict[str, Any]:
    return {item.name: result.as_numpy(item.name) for item in result.get_response().outputs}


def main() -> int:
    """Parse the command line, request the pictures and save them. Errors become one message."""
    from tritonclient.utils import InferenceServerException

    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="127.0.0.1:8001", help="the server's grpc address")
    conditions = parser.add_mutually_exclusive_group()
    conditions.add_argument("--labels", default="0", type=_labels, help="class labels, one per picture: 0,1,2")
    conditions.add_argument("--prompt", action="append", help="text of a picture; repeat it for more pictures")
    conditions.add_argument("--embeddings", type=Path, help="numpy archive (.npz) of inputs by name, a row for each picture")
    parser.add_argument("--negative-prompt", help="what the pictures must not show")
    parser.add_argument("--seed", type=_seed, help="seed of the first picture, each next one adds 1; default: the server chooses")
    parser.add_argument("--steps", type=_count, help="number of sampler steps")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 or less turns guidance off")
    parser.add_argument("--scheduler", help="ddim, dpmsolver++ or euler")
    parser.add_argument("--height", type=_count, help="of the pictures in pixels; default: the exported size")
    parser.add_argument("--width", type=_count, help="of the pictures in pixels; default: the exported size")
    parser.add_argument("--preview-every", type=_count, help="save the predicted picture after every N steps")
    parser.add_argument("--seconds", type=float, default=600, help="longest wait for a response")
    parser.add_argument("-o", "--output", type=Path, default=Path("pictures.png"))
    options = parser.parse_args()
    try:
        inputs = _conditions(options)
    except Exception as error:  # noqa: BLE001 - numpy has an error for each kind of damage
        parser.error(f"--embeddings {options.embeddings}: {error}")
    count = len(next(iter(inputs.values())))
    seeds = None if options.seed is None else [(options.seed + i) % 2**64 for i in range(count)]
    optional = {"seed": seeds, "num_inference_steps": options.steps, "guidance_scale": options.guidance}
    optional |= {"scheduler": options.scheduler, "preview_every": options.preview_every}
    optional |= {"negative_prompt": options.negative_prompt, "height": options.height, "width": options.width}
    try:
        for step, outputs in ask(
            options.url, {**inputs, **{k: v for k, v in optional.items() if v is not None}}, seconds=options.seconds
        ):
            path = options.output.with_stem(f"{options.output.stem}-{step}") if step else options.output
            save(path, outputs)
            print(f"{path}: seeds {', '.join(map(str, outputs['seed'].ravel().tolist()))}")
    except (InferenceServerException, OSError, queue.Empty) as error:
        reason = error.message() if isinstance(error, InferenceServerException) else error
        print(f"error: {reason or f'no answer in {options.seconds:g} s'}", file=sys.stderr)
        return 1
    return 0


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs that hold a row for each picture.

    Raises:
        Exception: the archive of embeddings cannot be read.
    """
    if options.embeddings is None:
        return {"prompt": options.prompt} if options.prompt else {"class_labels": options.labels}
    archive = np.load(options.embeddings)  # numpy refuses pickles
    if not isinstance(archive, np.lib.npyio.NpzFile) or not archive.files:
        raise ValueError("expected an archive of numpy (.npz) with arrays by the names of inputs")
    return {name: np.atleast_1d(archive[name]).astype(np.float32) for name in archive.files}


def _whole_number(text: str, below: int) -> int:
    """Parse a flag's whole number from 0 to `below` - 1."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < below):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {below - 1}, found {text[:40]!r}")
    return int(text)


def _seed(text: str) -> int:
    return _whole_number(text, 2**64)


def _count(text: str) -> int:
    return _whole_number(text, 2**31)


def _labels(text: str) -> list[int]:
    return [_whole_number(label, 2**31) for label in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
