"""Writes the README of a repository, and the configuration of the proxy in front of its server."""

from __future__ import annotations

import math
from pathlib import Path
from string import Template

from .model_config import CALLS, MAX_REQUESTS, Served
from .serving.conditions import ENCODED, PROMPT, PROMPT_BYTES

SERVED = Path(__file__).parent / "serving"
README, PROXY = "README.md", "nginx.conf"


def readme(served: Served, opset: int) -> str:
    """Return the README of a repository. `opset` is that of its graph."""
    template = Template((SERVED / README).read_text(encoding="utf-8"))
    shape = _listed(served.latents)
    return template.substitute(
        _condition_texts(served),
        backend=served.backend,
        needs=_needs(served, opset),
        gpus="--gpus all " if served.backend == "tensorrt" else "",
        call=_call(served),
        rows=served.max_rows,
        requests=MAX_REQUESTS,
        calls=CALLS,
        steps=served.steps,
        guidance=f"{served.guidance:g}",
        scales=SCALES[served.call.guided_by],
        taken="a guided picture takes two" if served.call.guided_by == "null" else "a picture takes one",
        batching=WITHOUT_DELAY if served.call.batched else ALONE,
        scheduler=served.scheduler,
        schedulers=", ".join(f"`{name}`" for name in served.schedules.tables),
        max_steps=served.schedules.max_steps,
        shape=shape,
        default_size=f"{served.sizes.height.default}, {served.sizes.width.default}",
        sizes=_sizes(served),
        latents_of="; of the default size alone" if served.sizes.vary else "",
        sharing=SHARING if served.sizes.vary else "",
        bounded=_bounded(served),
        megabytes=_megabytes(served),
        pictures="`images` UINT8[n, H, W, C]" if served.pictures or served.decoder else "no `images`: there is no decoder here",
        decoder=DECODED if served.decoder else "",
        waiting="" if served.plan or served.backend == "onnxruntime" else PLANLESS,
    )


def proxy(served: Served) -> str:
    """Return nginx's configuration, with the shapes that JSON may hold and the size of the largest request in MB."""
    template = Template((SERVED / PROXY).read_text(encoding="utf-8"))
    return template.substitute(shape="\\s*+,\\s*+".join(map(str, served.latents)), megabytes=_megabytes(served))


def _condition_texts(served: Served) -> dict[str, str]:
    """The parts of the README that differ between class labels, prompts and embeddings."""
    if served.call.labels:
        return {
            "required": "`class_labels`",
            "asked": "`class_labels` INT64[n, 1]",
            "curl": CURL.format('{"name": "class_labels", "datatype": "INT64", "shape": [2, 1], "data": [0, 1]}'),
            "pictures_of": "--labels 0,1,2,3",
            "picture_of": "--labels 3",
            "inputs": f"| `class_labels` | INT64[n, 1] | | 0 to {served.classes - 1}, n up to {served.max_images} |",
            "prompts": "", "install": "", "encoder": "", "endpoint": "",
        }  # fmt: skip
    return _prompt_texts(served) if served.encoder else _embedding_texts(served)


def _embedding_texts(served: Served) -> dict[str, str]:
    """Those parts without a text encoder."""
    conditions, zero = served.call.conditions, served.call.zero_null
    types = {name: f"FP32[n, {_listed(served.shapes[key])}]" for key, name in conditions.items()}
    allowed = {name: "1 for tokens, 0 for padding" if name.endswith("_mask") else "finite" for name in types}
    rows = [f"| `{name}` | {kind} | | {allowed[name]}, n up to {served.max_images} |" for name, kind in types.items()]
    if served.call.guided_by == "null":
        default = "zeros" if zero else ""
        rows += [f"| `negative_{name}` | {kind} | {default} | {allowed[name]} |" for name, kind in types.items()]
    needed = served.call.guided_by == "null" and not zero
    return {
        "required": " and ".join(f"`{name}`" for name in types),
        "asked": ", ".join(f"`{name}` {kind}" for name, kind in types.items()),
        "curl": "",
        "pictures_of": "--embeddings encoded.npz",
        "picture_of": "--embeddings encoded.npz",
        "inputs": "\n".join(rows),
        "prompts": EMBEDDINGS.format(
            arrays=", ".join(f"{name}=..." for name in types),
            negative=NEEDED.format(names=" and ".join(f"`negative_{name}`" for name in types)) if needed else "",
        ),
        "install": "", "encoder": "", "endpoint": "",
    }  # fmt: skip


def _prompt_texts(served: Served) -> dict[str, str]:
    """Those parts with a text encoder."""
    images = served.max_images
    guided, pictures = served.call.guided_by == "null", served.pictures or served.decoder
    texts = [text for text in served.prompts if PLAIN.issuperset(text)][:2]
    first, second = (*texts, *EXAMPLES)[:2]
    names, null = list(served.call.conditions.values()), "zeros in place of its embeddings" if served.call.zero_null else '""'
    embeddings = "\n".join(
        f"| `{name}`, `negative_{name}` | FP32[n, {_listed(served.shapes[key])}] | | in place of `prompt`, of `negative_prompt` |"
        if guided
        else f"| `{name}` | FP32[n, {_listed(served.shapes[key])}] | | in place of `prompt` |"
        for key, name in served.call.conditions.items()
    )
    negative = f"\n| `negative_prompt` | STRING[n, 1] | {null} | as `prompt`; unused where guidance is off |" if guided else ""
    return {
        "required": f"`{PROMPT}`",
        "asked": "`prompt` STRING[n, 1]",
        "curl": CURL.format(f'{{"name": "prompt", "datatype": "BYTES", "shape": [2, 1], "data": ["{first}", "{second}"]}}'),
        "pictures_of": f'--prompt "{first}" --prompt "{second}"',
        "picture_of": f'--prompt "{first}"',
        "inputs": f"| `prompt` | STRING[n, 1] | | UTF-8, {PROMPT_BYTES} bytes, and as many tokens as the encoder reads; n up to "
        f"{images} |{negative}\n{embeddings}",
        "prompts": PROMPTS.format(
            embeddings=" and ".join(f"`{name}`" for name in names), kept=ENCODED, empty=', also those of ""' if guided else ""
        ),
        "install": INSTALL,
        "encoder": ENCODER,
        "endpoint": ENDPOINT.format(prompt=first, negative="`negative_prompt`, " if guided else "") if pictures else "",
    }


def _call(served: Served) -> str:
    """The inputs of one network call, as the README lists them."""
    kinds = {"int64": "INT64", "float32": "FP32"}
    types = {"timestep": kinds[served.call.timestep]}
    types |= dict.fromkeys(served.call.conditions, "INT64") if served.call.labels else {}
    scalar = [1] if served.call.batched else []
    texts = []
    for name, shape in served.shapes.items():
        dims = shape if name in served.shared else ["n", *(shape or scalar)]
        texts.append(f"`{name}` {types.get(name, 'FP32')}[{_listed(dims)}]")
    return ", ".join(texts)


def _sizes(served: Served) -> str:
    """The sizes of pictures that requests may ask for, as the README has them."""
    height, width = served.sizes.height, served.sizes.width
    if not served.sizes.vary:
        return "these alone, in pixels"
    return f"heights of {height} and widths of {width}, in pixels"


def _bounded(served: Served) -> str:
    """What refuses shapes over grpc, as the README has it."""
    models = "`denoiser` and `decoder`" if served.sizes.vary and served.decoder else "`denoiser`"
    unbounded = [f"the height and the width that {models} take"] if served.sizes.vary else []
    unbounded += [] if served.call.batched else ["the rows of a call of `denoiser`"]
    if not unbounded:
        return BOUNDED
    http = "; the proxy's http port takes latents of the default size alone" if served.sizes.vary else ""
    return OPEN.format(unbounded=" or ".join(unbounded), models=models, megabytes=_megabytes(served), http=http)


def _listed(shape: object) -> str:
    return ", ".join(map(str, shape))  # type: ignore[call-overload]


def _megabytes(served: Served) -> int:
    """An upper bound of the largest request in MB: float32 inputs for each row of a call."""
    shapes = {**served.shapes, served.call.state: served.largest}
    return 1 + math.ceil(served.max_rows * sum(map(math.prod, shapes.values())) * 4 / 1e6)


def _needs(served: Served, opset: int) -> str:
    if served.backend == "tensorrt":
        return (
            "The container's TensorRT must be the version that built the plan: a plan of another version is refused.\n"
            "This command shows the container's version:\n"
            "`docker run --rm \"$TRITON_IMAGE\" sh -c 'ls /usr/lib/*/libnvinfer.so.*'`."
        )
    if opset >= 23:
        return f"The graph's opset {opset} needs ONNX Runtime 1.24: containers from 26.02 on."
    return f"The graph's opset {opset} runs on ONNX Runtime 1.19 and later: containers from 24.09 on."


CURL = """curl -s 127.0.0.1:8000/v2/models/pipeline/infer -d '{{"inputs": [
  {},
  {{"name": "num_inference_steps", "datatype": "INT32", "shape": [2, 1], "data": [20, 20]}},
  {{"name": "seed", "datatype": "UINT64", "shape": [2, 1], "data": [7, 8]}}]}}'

"""
EMBEDDINGS = """
## Embeddings

There is no text encoder here, because the export took the file of `--conditions`. Clients encode prompts as the model's own
pipeline does, padded to the length above, and send what it gives over grpc: JSON through the proxy holds at most 64 kB. The
client reads an archive of numpy with a row for each picture:

```python
numpy.savez("encoded.npz", {arrays})
```
{negative}"""
NEEDED = """
Guidance needs {names}, too, the embeddings of the prompt "". With `guidance_scale` 1 pictures are drawn without them.
"""
SHARING = """
Pictures of different sizes do not fit into one tensor. So each size has calls of its own, of up to `max_rows` rows, and the
sizes take turns: many sizes at a time make many small calls. A call of `max_rows` rows of the greatest size must fit the memory.
"""
BOUNDED = "Each config.pbtxt bounds its shapes, so over grpc the server itself refuses all others."
OPEN = """Over grpc the server itself refuses all shapes that no config.pbtxt has.

No config.pbtxt bounds {unbounded}: the pipelines check them. A grpc client that calls {models}
itself can send more, up to {megabytes} MB through the proxy. Open the grpc port to clients that you trust, and to programs
such as `images.py`{http}."""
SCALES = {
    "null": "0 or more; 1 or less turns guidance off",
    "input": "0 or more; the network itself applies it",
    "nothing": "0 to 1, which changes nothing: this network has no guidance",
}
"""What a request's `guidance_scale` may be, by the kind of guidance."""
ALONE = """
All rows of a call share the positions of their tokens, so the server does not put requests for the `denoiser` together. The
pipelines do: a client that calls it itself gets a call of its own."""
WITHOUT_DELAY = """
`dynamic_batching` of the denoiser has no queue delay on purpose: every step would wait for it."""
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ,.")
"""Characters that need no escape in a shell or in JSON."""
EXAMPLES = ("a house", "a tree")
DECODED = "\n| `decoder` | onnxruntime | `latents` of one picture; the scaling is part of the graph | `sample` FP32 in [-1, 1] |"
ENCODER = "\n| `text_encoder` | onnxruntime | tokens of a prompt: `input_ids` and `attention_mask` | the denoiser's conditions |"
INSTALL = """
The pipelines need the package `tokenizers` for the checkpoint's tokenizers. The container does not have it:

```sh
printf 'FROM %s\\nRUN pip install tokenizers\\n' "$TRITON_IMAGE" | docker build -t triton-text -
TRITON_IMAGE=triton-text
```
"""
PROMPTS = """
## Prompts

`text_encoder` encodes each prompt alone, padded with masked tokens to the length that the model's own pipeline uses. So
prompts of all lengths share the denoiser's calls, and a prompt's conditions do not depend on other prompts. The conditions of
the last {kept} prompts are cached{empty}. Clients that encode prompts themselves send {embeddings}
together, padded to the same length.
In JSON through the proxy below, write prompts in UTF-8 without escapes (`json.dumps(..., ensure_ascii=False)`); a prompt with
quotation marks needs grpc.
"""
ENDPOINT = """
## OpenAI's images API

`images.py` is a small service in front of the server, for clients of that API:

```sh
pip install "tritonclient[grpc]" starlette uvicorn
python images.py --triton 127.0.0.1:8001 --port 9100
curl -s 127.0.0.1:9100/v1/images/generations -H "content-type: application/json" -d '{{"prompt": "{prompt}", "seed": 7}}'
TRITON_IMAGE=… ADMIN_KEY="$(openssl rand -hex 16)" docker compose up        # both in containers; docker itself was not tried
```

```python
client = openai.OpenAI(base_url="http://127.0.0.1:9100/v1", api_key="none")
answer = client.images.generate(prompt="{prompt}", n=2, extra_body={{"seed": 7, "num_inference_steps": 20}})
```

It takes `prompt`, `n` and `size` (WIDTHxHEIGHT as allowed above, or `auto`), and returns `b64_json` of PNG. Its extensions
are `seed` (picture i has `seed` + i), {negative}`num_inference_steps`, `guidance_scale` and `scheduler`. It works on at
most 64 requests at a time (`--requests`); others get 503, after which OpenAI's clients try again. A body has at most 64 kB. A
client that hangs up frees its rows, as over grpc. It also serves `/health`, `/metrics` (Prometheus) and `/v1/models`. It has no
TLS and no authentication; add them.
"""
PLANLESS = """
**The plan is not here yet.** `dq-export finish OUT` on the GPU machine builds it and copies it to `denoiser/1/`.
"""
