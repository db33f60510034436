"""A Hugging Face checkpoint: its shards and index -> tensors with dtype, shape and byte range. No weight is read here.

The headers are checked by our own rules before anything else; afterwards only byte ranges are read, and nothing in the
folder is ever written.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.safetensors_file import StoredTensor, read_header
from convert.strict_json import read_json_object
from quant.errors import StreamquantError, UsageError
from quant.widen import SOURCE_DTYPES

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

WEIGHT_SUFFIXES = frozenset(
    (
        *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml"),
        *(".h5", ".msgpack", ".onnx", ".npz", ".npy", ".tflite", ".mlmodel"),
    )
)
MAX_CONFIG = 8 * 1024 * 1024
"""Bytes of config.json: a thousand times the usual; small values take a hundred times their text in memory."""
MAX_SIDE_FILE = 128 * 1024 * 1024
"""Larger files without a known suffix hold weights, whatever they are called."""
SIDE_FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint: bytes [start, stop) of `file`, little endian, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the matrix; 1 for a vector or scalar."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_length(self) -> int:
        """Weights in a row: all of them for a vector."""
        return self.count // self.rows

    @property
    def count(self) -> int:
        """Weights in the tensor."""
        return (self.stop - self.start) // SOURCE_DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A shard as it was when the plan was made; a change of any field means another source."""

    name: str
    size: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A local checkpoint folder, its headers read and checked."""

    folder: Path
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, SourceTensor]
    """By name, in the order of their data on disk: files by name, tensors by offset."""
    side_files: tuple[str, ...]
    """Files that belong to the model and hold no weights, relative to the folder."""
    ignored_files: tuple[str, ...]
    """Files in the folder that are not part of the checkpoint or hold weights in another form."""

    @property
    def name(self) -> str:
        """The name of the model: that of its folder."""
        return self.folder.name

    @property
    def parameter_count(self) -> int:
        """Weights in all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raise StreamquantError if a shard was replaced, truncated or touched since the headers were read."""
        for file in self.files:
            now = _stat(self.folder / file.name)
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                raise StreamquantError(
                    "a source file changed while it was being converted",
                    where=str(self.folder / file.name),
                    found=f"{now.st_size:,} bytes, modified at {now.st_mtime_ns} ns",
                    required=f"{file.size:,} bytes, modified at {file.mtime_ns} ns",
                    hint="wait until the download is complete, remove the output folder, and convert again",
                )


def open_checkpoint(folder: Path, *, dtypes: Collection[str] = SOURCE_DTYPES) -> Checkpoint:
    """Read the config, the index and the headers of all shards of a local checkpoint.

    Tensors of other dtypes than `dtypes` (safetensors' names) are refused. Raises UsageError without such a folder,
    StreamquantError for everything in it that is missing or broken.
    """
    if not folder.is_dir():
        raise UsageError(
            "no such model folder",
            where=str(folder),
            required="a folder with config.json and safetensors",
            hint="download the model first: hf download ORG/MODEL --local-dir DIR",
        )
    folder = folder.resolve()
    config = _read_config(folder)
    weight_map = _read_index(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    files: list[SourceFile] = []
    tensors: dict[str, SourceTensor] = {}
    for name in names:
        before = _stat(folder / name)
        stored, _, header = read_header(folder / name)
        files.append(SourceFile(name, before.st_size, before.st_mtime_ns, hashlib.sha256(header).hexdigest()))
        for tensor in stored.values():
            _add(tensors, tensor, name, folder, dtypes)
    if weight_map is not None:
        _compare_with_index(weight_map, tensors, folder)
    if not tensors:
        raise StreamquantError("checkpoint without tensors", where=str(folder))
    side, ignored = _other_files(folder, {*names, INDEX, CONFIG})
    return Checkpoint(folder, config, tuple(files), tensors, side, ignored)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise StreamquantError(
            "missing shard", where=str(path), found=error.strerror, hint="download the missing file"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise StreamquantError(
            "not a Hugging Face checkpoint", where=str(folder), found="no config.json", required="config.json"
        )
    return read_json_object(folder / CONFIG, MAX_CONFIG)


def _read_index(folder: Path) -> dict[str, str] | None:
    """The weight map (tensor name -> file name), or None where the checkpoint is a single file."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise _no_weights(folder)
        return None
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    where = f"{folder / INDEX}, weight_map"
    if not isinstance(weight_map, dict) or not weight_map:
        raise StreamquantError("broken index", where=where, required="an object: tensor name -> file name")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file or file in ("", ".", ".."):
            raise StreamquantError(
                "index names a file outside the checkpoint's folder",
                where=f"{where}, tensor {tensor!r}",
                found=repr(file),
                required="a plain file name",
            )
        if not file.endswith(".safetensors"):
            raise StreamquantError(
                "index names a file that is not safetensors", where=f"{where}, tensor {tensor!r}", found=file
            )
    return weight_map


def _no_weights(folder: Path) -> StreamquantError:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
    found, hint = "no safetensors", "download the model's weights"
    if shards:
        found, hint = f"{', '.join(shards[:3])} without an index", f"download {INDEX}"
    elif pickles:
        found = f"{', '.join(pickles[:3])}: pickle files run code when they are loaded and are never read"
        hint = "convert them to safetensors first"
    return StreamquantError(
        "no weights to convert", where=str(folder), found=found, required=f"{SINGLE_FILE} or {INDEX}", hint=hint
    )


def _add(
    tensors: dict[str, SourceTensor], stored: StoredTensor, file: str, folder: Path, dtypes: Collection[str]
) -> None:
    where = f"{folder / file}, tensor {stored.name!r}"
    if stored.name in tensors:
        raise StreamquantError("tensor occurs twice", where=where, found=f"also in {tensors[stored.name].file}")
    if stored.dtype not in dtypes:
        raise StreamquantError(
            "dtype cannot be converted",
            where=where,
            found=stored.dtype,
            required=", ".join(dtypes),
            hint="streamquant starts from the unquantized checkpoint",
        )
    if stored.start == stored.stop:
        raise StreamquantError("tensor without weights", where=where, found=f"shape {list(stored.shape)}")
    tensors[stored.name] = SourceTensor(stored.name, stored.dtype, stored.shape, file, stored.start, stored.stop)


def _compare_with_index(weight_map: dict[str, str], tensors: dict[str, SourceTensor], folder: Path) -> None:
    where = str(folder / INDEX)
    for name, file in weight_map.items():
        if name not in tensors:
            raise StreamquantError(
                "tensor of the index is in no shard",
                where=where,
                found=f"no {name!r} in {file}",
                hint="download it again",
            )
        if tensors[name].file != file:
            raise StreamquantError(
                "index and shards disagree", where=f"{where}, {name!r}", found=tensors[name].file, required=file
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise StreamquantError(
                "tensor of a shard is not in the index",
                where=f"{folder / tensor.file}, tensor {name!r}",
                hint=f"shards and {INDEX} are of different versions; download both again",
            )


def _other_files(folder: Path, known: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What else lies in the folder: (side files that come along, files that do not)."""
    side: list[str] = []
    ignored: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in known or path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name in SIDE_FOLDERS:
                side += [f"{path.name}/{child.name}" for child in sorted(path.iterdir()) if _is_side_file(child)]
            else:
                ignored.append(f"{path.name}/")
        else:
            (side if _is_side_file(path) else ignored).append(path.name)
    return tuple(side), tuple(ignored)


def _is_side_file(path: Path) -> bool:
    holds_weights = path.suffix.lower() in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return path.is_file() and not holds_weights and path.stat().st_size <= MAX_SIDE_FILE
