"""A Hugging Face checkpoint: its shards and index -> tensors with dtype, shape and byte range. No weight is read here.

The headers are checked by our own rules before anything else; afterwards only byte ranges are read, and nothing in the
folder is ever written. A checkpoint of the Hub is the same thing: convert/source/hub_checkpoint.py makes it.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from streamquant.convert.architectures import family_of, text_config
from streamquant.convert.architectures.names import of_published, published_name, renaming_note
from streamquant.convert.source.config_as_stored import config_of_weights, read_config
from streamquant.convert.source.fused_experts import separate_experts
from streamquant.convert.source.model_folder import name_of
from streamquant.convert.source.passed_over import Shards, passed_over_note
from streamquant.convert.source.quantized import QuantizedSource, dequantized
from streamquant.convert.source.side_files import SIDE_FOLDERS, is_side_file
from streamquant.convert.source.tensor import SourceTensor
from streamquant.convert.source.weights import (
    ADAPTER,
    CONFIG,
    INDEX,
    SINGLE_FILE,
    Place,
    Weights,
    find_weights,
    refuse_adapters,
)
from streamquant.files.folders import real_path
from streamquant.files.machine import collector_paused
from streamquant.files.reading import read_bytes
from streamquant.files.safetensors_file import SafetensorsTensor, read_header
from streamquant.files.strict_json import MAX_BYTES, read_json_object
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.widen import SOURCE_DTYPES

MAX_CONFIG = 8 * 1024 * 1024
"""Bytes of config.json: a thousand times the usual; small values take a hundred times their text in memory."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A shard as it was when the plan was made; a change of any field means another source."""

    name: str
    size: int
    mtime_ns: int
    """0 for a shard of the Hub."""
    header_sha256: str
    etag: str | None = None
    """The hash of the whole file by which the Hub knows it; None in a local folder."""

    @property
    def identity(self) -> list[str | int]:
        """What a fingerprint says of the file."""
        known = [] if self.etag is None else [self.etag]
        return [self.name, self.size, self.mtime_ns, self.header_sha256, *known]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, its headers read and checked: a local folder, or a HubCheckpoint."""

    folder: Path
    """Holds the shards, unless they are on the Hub, and all files that planning reads. Its name is the model's."""
    config: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    tensors: Mapping[str, SourceTensor]
    """By name, in the order of their data on disk: files by name, tensors by offset."""
    side_files: tuple[str, ...]
    """Files that belong to the model and hold no weights, relative to the folder."""
    ignored_files: tuple[str, ...]
    """Files in the folder that are not part of the checkpoint or hold weights in another form."""
    given_name: str | None = field(default=None, kw_only=True)
    """The name of the model, where it is not that of `folder`, which is a real path (model_folder.py)."""
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    """What a user should know about the reading."""
    quantized: QuantizedSource | None = field(default=None, kw_only=True)
    """What the weights had lost before; None for plain floats."""

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.given_name or self.folder.name

    @property
    def parameter_count(self) -> int:
        """Weights in all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raise StreamquantError if a shard was replaced, truncated or touched since the headers were read."""
        for file in self.files:
            now = stat_shard(self.folder / file.name)
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                raise StreamquantError(
                    "a source file changed while it was being converted",
                    where=str(self.folder / file.name),
                    found=f"{now.st_size:,} bytes, modified at {now.st_mtime_ns} ns",
                    required=f"{file.size:,} bytes, modified at {file.mtime_ns} ns",
                    hint="wait until the download is complete, remove the output folder, and convert again",
                )

    def where(self, shard: str) -> str:
        """A shard as messages name it."""
        return str(self.folder / shard)

    def read_range(self, shard: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard. Raises StreamquantError if it cannot be read, or ends before."""
        try:
            with (self.folder / shard).open("rb") as file:
                file.seek(start)
                found = file.read(stop - start)
        except OSError as error:
            raise StreamquantError("cannot read a shard", where=self.where(shard), found=error.strerror) from error
        if len(found) != stop - start:
            raise StreamquantError("cannot read a shard", where=self.where(shard), found="it ends before")
        return found

    @property
    def source(self) -> str:
        """The whole as messages name it."""
        return str(self.folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config, the index and the headers of all shards of a local checkpoint that is to be converted.

    Raises UsageError without such a folder, StreamquantError for everything in it that is missing or broken.
    """
    checkpoint = as_source(read_checkpoint(folder))
    check_dtypes(checkpoint)
    return checkpoint


C = TypeVar("C", bound="Checkpoint")


@collector_paused()
def as_source(checkpoint: C) -> C:
    """A checkpoint of weights: codes with their scales (quantized.py), and a config that fits (config_as_stored.py).

    Raises StreamquantError for codes and scales that do not fit together.
    """
    found = dequantized(checkpoint.config, checkpoint.tensors, checkpoint.source)
    if found is not None:
        notes = (*checkpoint.notes, *found.notes)
        checkpoint = replace(
            checkpoint, tensors=found.tensors, config=found.config, quantized=found.quantized, notes=notes
        )
    return with_fitting_config(checkpoint)


def with_fitting_config(checkpoint: C) -> C:
    """A checkpoint whose config fits its tensors as they stand (config_as_stored.py)."""
    config, changes = config_of_weights(checkpoint.config, checkpoint.tensors)
    return replace(checkpoint, config=config, notes=(*checkpoint.notes, *changes))


def check_dtypes(checkpoint: Checkpoint) -> None:
    """Raise StreamquantError for a tensor that is neither plain floats nor codes with their scales."""
    for tensor in checkpoint.tensors.values():
        if tensor.dtype not in SOURCE_DTYPES:
            raise StreamquantError(
                "dtype cannot be converted",
                where=f"{checkpoint.source}/{tensor.file}, tensor {tensor.name!r}",
                found=tensor.dtype,
                required=", ".join(SOURCE_DTYPES),
                hint="streamquant starts from the unquantized checkpoint, or from FP8 that the quantization_config of"
                " config.json explains",
            )


@collector_paused()
def read_checkpoint(folder: Path) -> Checkpoint:
    """As `open_checkpoint`, with the tensors and config.json as they stand."""
    if not folder.is_dir():
        raise UsageError(
            "no such model folder",
            where=str(folder),
            required="a folder with config.json and safetensors",
            hint="download the model first: hf download ORG/MODEL --local-dir DIR",
        )
    name, folder = name_of(folder), real_path(folder)
    place = _place(folder)
    weights = find_weights(place)
    config = read_config(place)
    files: list[SourceFile] = []
    stored: dict[str, Collection[SafetensorsTensor]] = {}
    for shard in weights.shards:
        before = stat_shard(folder / shard)
        entries, _, header = read_header(folder / shard)
        files.append(SourceFile(shard, before.st_size, before.st_mtime_ns, hashlib.sha256(header).hexdigest()))
        stored[shard] = entries.values()
    tensors = collect_tensors(stored, weights, str(folder), config)
    side, ignored = _other_files(folder, {*weights.shards, weights.index, INDEX, CONFIG})
    notes = [*reading_notes(place, weights, stored, config)]
    if weights.passed_over:
        notes.append(passed_over_note(place, _shards(folder), stored[SINGLE_FILE]))
    return Checkpoint(folder, config, tuple(files), tensors, side, ignored, given_name=name, notes=tuple(notes))


@collector_paused()
def collect_tensors(
    stored: Mapping[str, Collection[SafetensorsTensor]],
    weights: Weights,
    where: str,
    config: Mapping[str, Any],
) -> dict[str, SourceTensor]:
    """Shard -> its tensors, in their order, to the tensors of a checkpoint by name, compared with the index.

    config.json, which may be of any kind, tells the class, and so how its tensors may be called.

    Raises StreamquantError for a tensor that occurs twice or is empty, for none at all, and for an index that says
    something else.
    """
    tensors: dict[str, SourceTensor] = {}
    for name, entries in stored.items():
        for tensor in entries:
            _add(tensors, tensor, name, where)
    if weights.weight_map is not None:
        _compare_with_index(weights.weight_map, tensors, where, weights.index)
    if not tensors:
        raise StreamquantError("checkpoint without tensors", where=where)
    refuse_adapters(tensors, where)
    family = family_of(config)
    return separate_experts(_by_model_name(tensors, where, config), family.experts if family else None, where)


def reading_notes(
    place: Place, weights: Weights, stored: Mapping[str, Collection[SafetensorsTensor]], config: Mapping[str, Any]
) -> Iterator[str]:
    """What a user should know about the files and names of the weights."""
    yield from weights.notes
    family = family_of(config)
    is_multimodal = family is not None and family.multimodal is not None
    note = renaming_note(
        (tensor.name for entries in stored.values() for tensor in entries), is_multimodal=is_multimodal
    )
    if note is not None:
        yield note
    if ADAPTER in place.names:
        yield (
            f"{ADAPTER} is left out: the weights of {weights.shards[0]} are converted, whether or not the adapter"
            " is merged into them"
        )


def _by_model_name(
    tensors: Mapping[str, SourceTensor], where: str, config: Mapping[str, Any]
) -> dict[str, SourceTensor]:
    """The tensors under the names of their class. Raises StreamquantError where two would have one."""
    family = family_of(config)
    mtp = family.mtp if family is not None else None
    layers = text_config(family, config).get("num_hidden_layers") if family is not None and mtp is not None else None
    renamed: dict[str, SourceTensor] = {}
    for stored, tensor in tensors.items():
        of_file = published_name(stored)
        name = known = of_published(of_file)
        if mtp is not None and type(layers) is int:
            name = mtp.layer_name(known, layers)
        if name in renamed:
            raise StreamquantError(
                "two tensors are the same tensor of the model",
                where=f"{where}/{tensor.file}, tensor {stored!r}",
                found=f"{name!r} is in {renamed[name].file} too",
                hint="keep one of them: the names differ by what a wrapper added",
            )
        published = of_file if family is not None and family.multimodal is not None else known
        if (name, published) == (stored, stored):
            renamed[name] = tensor
        else:
            own = None if published == name else published
            place = tensor.file, tensor.start, tensor.stop
            renamed[name] = SourceTensor(name, tensor.dtype, tensor.shape, *place, published=own)
    return renamed


def stat_shard(path: Path) -> os.stat_result:
    """What the file system says of a shard. Raises StreamquantError if it is not there."""
    try:
        return path.stat()
    except OSError as error:
        raise StreamquantError(
            "missing shard", where=str(path), found=error.strerror, hint="download the missing file"
        ) from error


def _shards(folder: Path) -> Shards:
    return Shards(
        lambda name: (folder / name).is_file(),
        lambda names: [read_header(folder / name)[0].values() for name in names],
        lambda name, start, stop: read_bytes(folder / name, start, stop).tobytes(),
    )


def _place(folder: Path) -> Place:
    try:
        names = frozenset(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(folder), found=error.strerror) from error
    return Place(
        str(folder), names, lambda name: read_json_object(folder / name, MAX_CONFIG if name == CONFIG else MAX_BYTES)
    )


def _add(tensors: dict[str, SourceTensor], stored: SafetensorsTensor, file: str, folder: str) -> None:
    def where() -> str:
        return f"{folder}/{file}, tensor {stored.name!r}"

    if stored.name in tensors:
        raise StreamquantError("tensor occurs twice", where=where(), found=f"also in {tensors[stored.name].file}")
    if stored.start == stored.stop:
        raise StreamquantError(
            "tensor without weights",
            where=where(),
            found=f"shape {list(stored.shape)}",
            hint="DeepSpeed ZeRO-3 leaves such tensors where its parts were not gathered: make the model with the"
            " training checkpoint's zero_to_fp32.py, or save it with stage3_gather_16bit_weights_on_model_save",
        )
    tensors[stored.name] = SourceTensor(stored.name, stored.dtype, stored.shape, file, stored.start, stored.stop)


def _compare_with_index(
    weight_map: Mapping[str, str], tensors: dict[str, SourceTensor], folder: str, index: str
) -> None:
    where = f"{folder}/{index}"
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
                where=f"{folder}/{tensor.file}, tensor {name!r}",
                hint=f"shards and {index} are of different versions; download both again",
            )


def _other_files(folder: Path, known: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What else lies in the folder: (side files that come along, files that do not)."""
    side: list[str] = []
    ignored: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name in known or path.name.startswith("."):
            continue
        if path.is_dir():
            found = _side_files_in(folder, sorted(path.iterdir())) if SIDE_FOLDERS.fullmatch(path.name) else []
            side += found
            ignored += [] if found else [f"{path.name}/"]
        else:
            found = _side_files_in(folder, [path])
            side += found
            ignored += [] if found else [path.name]
    return tuple(side), tuple(ignored)


def _side_files_in(folder: Path, paths: Iterable[Path]) -> list[str]:
    names = [(path, path.relative_to(folder).as_posix()) for path in paths]
    return [name for path, name in names if path.is_file() and is_side_file(name, path.stat().st_size)]
