"""What is in a file or folder: tensors, types, bytes, metadata. Reads headers only, of GGUF and safetensors."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamquant.files import gguf_file
from streamquant.files.safetensors_file import read_header
from streamquant.files.strict_json import read_json_object
from streamquant.model.variants.folder import QUANTIZATION_KEYS
from streamquant.quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its container states it; shape in torch's order, nbytes of data, offset from the file's start."""

    name: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One container file."""

    path: Path
    size: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: tuple[StoredTensor, ...] = field(repr=False)


def inspect_path(path: Path) -> list[StoredFile]:
    """Every GGUF and safetensors file that `path` is, or that lies below it, by name.

    Raises UsageError if there is none, StreamquantError for a file that is broken.
    """
    if path.is_file():
        return [inspect_file(path)]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".gguf", ".safetensors") and file.is_file())
    if not files:
        raise UsageError(
            "nothing to inspect", where=str(path), required="a .gguf or .safetensors file, or a folder of them"
        )
    return [inspect_file(file) for file in files]


def inspect_file(path: Path) -> StoredFile:
    """The metadata and tensors of one file, by its suffix. Raises StreamquantError if it is broken or neither kind."""
    if path.suffix == ".gguf":
        return _inspect_gguf(path)
    if path.suffix == ".safetensors":
        return _inspect_safetensors(path)
    raise UsageError("unknown kind of file", where=str(path), required="a name that ends in .gguf or .safetensors")


def _inspect_safetensors(path: Path) -> StoredFile:
    stored, metadata, _ = read_header(path)
    tensors = tuple(StoredTensor(t.name, t.dtype, t.shape, t.stop - t.start, t.start) for t in stored.values())
    return StoredFile(path, path.stat().st_size, dict(metadata) | _quantization_of(path.parent), tensors)


def _quantization_of(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says of quantization, by its key, if it says something."""
    config = folder / "config.json"
    found = read_json_object(config) if config.is_file() else {}
    return {key: found[key] for key in QUANTIZATION_KEYS if found.get(key) is not None}


def _inspect_gguf(path: Path) -> StoredFile:
    header = gguf_file.read_header(path)
    tensors = tuple(StoredTensor(t.name, t.stored_as, t.shape, t.stop - t.start, t.start) for t in header.tensors)
    return StoredFile(path, path.stat().st_size, header.metadata, tensors)
