"""The tensors of a file of weights, safetensors or pickle; only this module opens such files."""

from __future__ import annotations

import math
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

from dq_export.core.documents import TEXT_LIMIT, DocumentError, parse_json, printable, shown, shown_path

from .reference import ModelError

REMEDY = "copy or download it again"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PLAIN = re.compile(
    r"collections\.OrderedDict|torch\.Size|torch\.\w*Storage|torch\.storage\.\w*Storage"
    r"|torch\._utils\._rebuild_(tensor(_v2|_v3)?|parameter)|torch\.(b?float|u?int|bool|half)\w*"
)
"""The names to which a pickle of tensors refers. torch's restricted loader allows more, for example `bytearray` of any size."""
REFERENCES = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
"""Operations of a pickle that refer to a name; torch's own files use only GLOBAL."""
OLD_PICKLES = 5
"""At the head of a file from before torch 1.6: magic number, version, machine, tensors, names of their storages."""
PICKLE_LIMIT = 64 << 20
"""The greatest size, in bytes, of the pickle in a zip file, which names the tensors; 10,000 tensors take under 2 million."""
BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    UnpicklingError, ValueError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""The errors that torch, zipfile and pickletools raise on damaged files; torch's loader has no class for them."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The place of a tensor in a file.

    Args:
        offset: of its first byte in `file`; None if its bytes are not in C order or not in this machine's byte order.
    """

    file: Path
    float32: bool
    shape: tuple[int, ...]
    offset: int | None


def stored(file: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a file; the content is not read.

    Raises:
        ModelError: not regular, cut short, or damaged.
    """
    _require_weights(file)
    return _stored_safetensors(file) if file.suffix == ".safetensors" else _stored_pickle(file)


def read_tensors(file: Path) -> dict[str, Any]:
    """Name -> torch tensor of every tensor of a file, in the file's types, mapped from the file.

    A pickle from before torch 1.6 is not a zip file, and is read into memory.

    Raises:
        ModelError: see `stored`, and a pickle of anything but tensors by name.
    """
    if file.suffix != ".safetensors":
        _require_weights(file)
        return _load_pickle(file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stored(file)  # it has better messages for most damaged files
    try:
        tensors: dict[str, Any] = load_file(file)
    except (SafetensorError, *BROKEN) as error:
        raise ModelError(f"{shown_path(file)}: not readable as safetensors ({_line(error)}); {REMEDY}") from error
    return tensors


def _require_weights(file: Path) -> None:
    """Refuse files that no loader should open: folders, pipes, empty files, and git-lfs's pointers."""
    if not file.is_file():
        problem = "a link to nothing, or not a regular file" if file.is_symlink() or file.exists() else "no such file"
        raise ModelError(f"{shown_path(file)}: {problem}; expected the weights; {REMEDY}")
    try:
        with file.open("rb") as content:
            start = content.read(24)
    except OSError as error:
        raise ModelError(f"{shown_path(file)}: cannot be read ({error.strerror})") from error
    if not start:
        raise ModelError(f"{shown_path(file)}: empty; {REMEDY}")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{shown_path(file)}: git-lfs's pointer, not the weights; run `git lfs pull` in its folder")


def _stored_safetensors(file: Path) -> dict[str, Stored]:
    """Format: huggingface.co/docs/safetensors."""
    place, size = shown_path(file), file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or not 2 <= length <= TEXT_LIMIT:
            raise ModelError(f"{place}: not a safetensors file (its header would have {length} bytes); {REMEDY}")
        text = content.read(length)
    if len(text) < length:
        raise ModelError(f"{place}: cut short: {size} bytes, and its header alone has {length}; {REMEDY}")
    try:
        header = parse_json(text.decode("utf-8"), f"header of {place}")
    except (DocumentError, UnicodeDecodeError) as error:
        raise ModelError(f"{place}: its header is damaged ({_line(error)}); {REMEDY}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{place}: its header is damaged (no JSON object); {REMEDY}")
    places = {name: _place(file, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if end > size:
        raise ModelError(f"{place}: cut short: it has {size} of {end} bytes; {REMEDY}")
    return places


def _place(file: Path, start: int, name: str, entry: Any) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            good = all(isinstance(size, int) and 0 <= size < 1 << 48 for size in shape) and 0 <= first <= last
            if good and math.prod(shape) * ITEM_BYTES.get(dtype, 0) in (0, last - first):
                return Stored(file=file, float32=dtype == "F32", shape=tuple(shape), offset=start + first)
    raise ModelError(f"{shown_path(file)}: its header is damaged (tensor {shown(name)}: {shown(entry)}); {REMEDY}")


def _stored_pickle(file: Path) -> dict[str, Stored]:
    import torch

    with _damage(shown_path(file)):
        native = (_byte_order(file) or sys.byteorder) == sys.byteorder
    size, places = file.stat().st_size, {}
    for name, tensor in _load_pickle(file, "meta").items():
        # torch sets this where it loads shapes alone, from a zip file; an old pickle cannot be mapped.
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        offset = None
        if start is not None and tensor.is_contiguous() and native:
            offset = start + tensor.storage_offset() * tensor.element_size()
            if offset + tensor.nbytes > size:
                raise ModelError(f"{shown_path(file)}: damaged (tensor {shown(name)} ends behind the file); {REMEDY}")
        places[name] = Stored(file=file, float32=tensor.dtype == torch.float32, shape=tuple(tensor.shape), offset=offset)
    return places


def _load_pickle(file: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a pickle with torch's restricted loader, after checking the names to which it refers."""
    import torch

    place = shown_path(file)
    with _damage(place):
        with file.open("rb") as content:
            zipped = content.read(2) == b"PK"
            content.seek(0)
            _require_plain_zip(file) if zipped else _require_plain_pickles(content, place, OLD_PICKLES)
        tensors = torch.load(str(file), map_location=device, weights_only=True, mmap=zipped and device == "cpu")
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ModelError(f"{place}: holds {shown(type(tensors).__name__)}; expected tensors by name, as state_dict() gives them")
    other = next((name for name, value in tensors.items() if not _dense(value)), None)
    if other is not None:
        raise ModelError(
            f"{place}: {shown(other)} is {shown(type(tensors[other]).__name__)}; expected a dense tensor for each name"
        )
    # A tensor with stride 0 can have any shape on the bytes of one number, and a copy of it takes the memory of that shape.
    repeated = next((name for name, value in tensors.items() if value.untyped_storage().nbytes() < value.nbytes), None)
    if repeated is not None:
        raise ModelError(
            f"{place}: {shown(repeated)} has shape {shown(tuple(tensors[repeated].shape))} and repeats fewer stored numbers; "
            "save it anew after .contiguous()"
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


@contextmanager
def _damage(place: str) -> Iterator[None]:
    """A context for reading a pickle; any error becomes a ModelError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickles that it refuses next
            yield
    except zipfile.BadZipFile as error:
        raise ModelError(f"{place}: cut short or damaged ({_line(error)}); {REMEDY}") from error
    except UnpicklingError as error:
        refused = re.search(r"[^.\n]*unsupported \S+[^\n]*", str(error), re.IGNORECASE)
        reason = printable(refused[0].strip(), 200) if refused else _line(error)
        raise ModelError(f"{place}: torch's restricted loader refuses it ({reason}); only tensors by name are read") from error
    except BROKEN as error:
        raise ModelError(f"{place}: damaged, or not a file of torch.save ({_line(error)}); {REMEDY}") from error


def _dense(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized


def _require_plain_zip(file: Path) -> None:
    """Refuse a zip file of torch.save that holds other objects than tensors, or compressed records, which cannot be mapped."""
    place = shown_path(file)
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ModelError(f"{place}: its records are compressed; save it anew with torch.save")
            if record.filename.lower().endswith(".pkl"):
                if record.file_size > PICKLE_LIMIT:
                    raise ModelError(f"{place}: names its tensors in {record.file_size} bytes; the limit is {PICKLE_LIMIT}")
                with archive.open(record) as content:
                    _require_plain_pickles(content, place, 1)


def _require_plain_pickles(content: IO[bytes], place: str, count: int) -> None:
    """Refuse pickles that refer to other names than those of tensors; checks the first `count` pickles of a file."""
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(content):
            name = str(argument).replace(" ", ".", 1) if operation.name in ("GLOBAL", "INST") else operation.name
            if operation.name in REFERENCES and not PLAIN.fullmatch(name):
                raise ModelError(
                    f"{place}: this pickle refers to {shown(name)}, which no tensor needs and which might run code; only tensors "
                    "by name are read. Ask its author for safetensors"
                )


def _byte_order(file: Path) -> str | None:
    """`little` or `big` if a zip file of torch.save states its byte order."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.filename.endswith("/byteorder") and record.file_size <= 64:
                return archive.read(record).decode("ascii", "replace")
    return None


def _line(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0], 200) or type(error).__name__
