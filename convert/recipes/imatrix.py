"""Importance matrices of llama-imatrix: how much an error in each input column of a tensor counts.

Two file formats (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp):

GGUF: general.type "imatrix"; imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; for each weight
`NAME.in_sum2` F32 [matrices, columns], sums of squared inputs, and `NAME.counts` F32 [matrices, 1], rows summed.
Legacy (.dat): i32 entries; each i32 length, name, i32 calls, i32 values, f32 values; i32 chunks, i32 length, dataset.

What llama-quantize makes of them (tools/quantize/quantize.cpp, load_imatrix): the mean square, sum / count, in single
precision; ones for an expert that saw no rows; legacy values / calls.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf.constants import GGUF_MAGIC, GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.files import gguf_file
from streamquant.files.json_record import JsonRecord
from streamquant.files.sizes import shortened
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.format import Importance

MAX_BYTES = 4 * 2**30
"""Largest file that is read: one for 671B weights in 256 experts a layer has about 2 GB."""
MAX_TEXT = 64 * 1024
"""Longest name or dataset of a legacy file, in bytes."""
KEY_BYTES = 127
"""llama-quantize cuts the strings that it writes into quantize.imatrix.* to this many bytes."""

_SUMS, _COUNTS, _MEANS = ".in_sum2", ".counts", ".in_sum"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


UNNAMED = "unknown"
"""Stands for the name of a file that a manifest does not name; no importance matrix is called so (it has a suffix)."""


@dataclass(frozen=True, slots=True)
class ImatrixRecord:
    """What a manifest says of an importance matrix, and what `select` and the keys of a repetition need."""

    file: str
    """Name, without its folder; UNNAMED if the manifest does not say."""
    sha256: str
    datasets: tuple[str, ...]
    entries: int | None
    """Number of tensors that it had entries for; None if the manifest does not say."""
    chunks: int
    """Chunks of text it was computed on; 0 if the file does not say."""
    include_weights: tuple[str, ...]
    exclude_weights: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """As in a manifest; `parse_imatrix` is the inverse."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "datasets": list(self.datasets),
            "entries": self.entries,
            "chunks": self.chunks,
            "include_weights": list(self.include_weights),
            "exclude_weights": list(self.exclude_weights),
        }

    def words(self) -> list[str]:
        """As on a command line."""
        words = ["--imatrix", PurePosixPath(self.file).name]
        for flag, texts in (("--include-weights", self.include_weights), ("--exclude-weights", self.exclude_weights)):
            words += [word for text in texts for word in (flag, text)]
        return words


def parse_imatrix(record: JsonRecord) -> ImatrixRecord:
    """The inverse of `ImatrixRecord.json`. Raises StreamquantError for a value of another kind."""
    return ImatrixRecord(
        record.optional_text("file") or UNNAMED,
        record.text("sha256"),
        record.texts("datasets"),
        None if record.take("entries") is None else record.count("entries"),
        0 if record.take("chunks") is None else record.count("chunks"),
        record.texts("include_weights"),
        record.texts("exclude_weights"),
    )


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """The entries of a file that are used, and what is recorded of it."""

    name: str
    """Of the file, without its folder."""
    sha256: str
    """Of the whole file."""
    datasets: tuple[str, ...]
    chunk_count: int
    """Chunks of text it was computed on; 0 if the file does not say."""
    entries: Mapping[str, Importance] = field(repr=False)
    """GGUF tensor name -> float32[matrices * columns], finite and not negative."""
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """GGUF name of stacked experts -> the experts that no token of the text went through; their importance is ones."""

    @property
    def nbytes(self) -> int:
        """Bytes that the entries take in memory."""
        return sum(entry.nbytes for entry in self.entries.values())

    def select(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> "ImportanceMatrix":
        """Only the entries whose name contains one of `include`, or none of `exclude` (llama-quantize's options).

        Raises UsageError if both are given or nothing is left.
        """
        if include and exclude:
            raise UsageError("--include-weights and --exclude-weights contradict each other", required="one of them")
        kept = {
            name: entry
            for name, entry in self.entries.items()
            if (not include or any(text in name for text in include)) and not any(text in name for text in exclude)
        }
        if not kept:
            raise UsageError(
                "no entry of the importance matrix is left",
                where=self.name,
                found=f"include {list(include)}, exclude {list(exclude)}",
                hint="leave --imatrix out, or choose other weights",
            )
        return replace(self, entries=kept, include_weights=tuple(include), exclude_weights=tuple(exclude))

    def find(self, name: str, shape: tuple[int, ...]) -> Importance | None:
        """The importance of a tensor of this shape (torch order), float32[columns] (of each expert, one after another).

        None if there is no entry; of token_embd.weight also if the entry has another length, as in llama-quantize.
        Raises StreamquantError for an entry of another length.
        """
        entry = self.entries.get(name)
        required = shape[-1] * (shape[-3] if len(shape) > 2 else 1)
        if entry is None or entry.size == required:
            return entry
        if name in ("token_embd.weight", "per_layer_token_embd.weight"):
            return None
        raise StreamquantError(
            "importance of another length than the tensor's rows",
            where=f"{self.name}, entry {name!r}",
            found=f"{entry.size:,} values",
            required=f"{required:,}",
            hint="use the importance matrix of this model",
        )

    def keys(self) -> dict[str, GGUFValue]:
        """The keys that llama-quantize adds at the end of a file. The file's name is written without its folder."""
        keys = {"quantize.imatrix.file": GGUFValue(_cut(self.name), GGUFValueType.STRING)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = GGUFValue(_cut(self.datasets[0]), GGUFValueType.STRING)
        keys["quantize.imatrix.entries_count"] = GGUFValue(len(self.entries), GGUFValueType.UINT32)
        if self.chunk_count > 0:
            keys["quantize.imatrix.chunks_count"] = GGUFValue(self.chunk_count, GGUFValueType.UINT32)
        return keys

    def record(self) -> ImatrixRecord:
        """All but its values."""
        return ImatrixRecord(
            file=self.name,
            sha256=self.sha256,
            datasets=self.datasets,
            entries=len(self.entries),
            chunks=self.chunk_count,
            include_weights=self.include_weights,
            exclude_weights=self.exclude_weights,
        )


def unreached_notes(unreached: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """A warning that names the experts, by GGUF tensor, that no token of a text went through; none if there are none.

    llama-quantize weighs all their columns alike (tools/quantize/quantize.cpp, load_imatrix).

    >>> unreached_notes({"blk.5.ffn_up_exps.weight": [2, 7], "blk.5.ffn_gate_exps.weight": [2, 7]})[0][:89]
    "WARNING: no token of the importance matrix's text went through 2 experts: blk.5 2, 7. All"
    """
    layers: dict[str, set[int]] = {}
    for name in sorted(unreached):
        layers.setdefault(name.rpartition(".ffn_")[0], set()).update(unreached[name])
    if not layers:
        return ()
    named = [f"{layer} {shortened([str(number) for number in sorted(layers[layer])], 8)}" for layer in layers]
    count = sum(len(experts) for experts in layers.values())
    return (
        f"WARNING: no token of the importance matrix's text went through {count} experts: {shortened(named, 8, '; ')}. "
        "All their columns weigh the same; a longer or more varied text reaches them",
    )


def _cut(text: str) -> str:
    """At most KEY_BYTES bytes of UTF-8, whole characters."""
    return text.encode()[:KEY_BYTES].decode(errors="ignore")


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read a GGUF or legacy file, told apart by its first bytes.

    Raises StreamquantError if it cannot be read, is larger than MAX_BYTES, truncated, or not what llama-imatrix writes,
    and for values that are negative or not finite.
    """
    path = Path(path)
    where = str(path)
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise StreamquantError("no importance matrix here", where=where, required="a file of llama-imatrix")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise StreamquantError(
                "importance matrix too large", where=where, found=f"{size:,} bytes", required=f"at most {MAX_BYTES:,}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise StreamquantError("cannot read a file", where=where, found=error.strerror) from error
    try:
        is_gguf = content[:4] == GGUF_MAGIC.to_bytes(4, "little")
        found = _read_gguf(path, content) if is_gguf else _Legacy(content).read()
        for name, entry in found.entries.items():
            _check_values(name, entry)
    except _Broken as error:
        raise StreamquantError(
            "not a readable importance matrix",
            where=where,
            found=str(error),
            required="a file of llama-imatrix, GGUF or .dat",
            hint="fetch or make the file again",
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    return ImportanceMatrix(
        path.name, sha256, found.datasets, found.chunks, found.entries, unreached=MappingProxyType(found.unreached)
    )


class _Broken(Exception):  # noqa: N818 - internal: becomes a StreamquantError that names the file
    pass


@dataclass(frozen=True, slots=True)
class _Contents:
    entries: dict[str, Importance]
    datasets: tuple[str, ...]
    chunks: int
    unreached: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _check_values(name: str, entry: Importance) -> None:
    if not np.isfinite(entry).all():
        raise _Broken(f"entry {name!r} has values that are not finite")
    if (entry < 0).any():
        raise _Broken(f"entry {name!r} has negative values")


# GGUF


def _read_gguf(path: Path, content: bytes) -> _Contents:
    header = gguf_file.read_header(path)
    metadata, tensors = header.metadata, {tensor.name: tensor for tensor in header.tensors}
    if (kind := metadata.get("general.type", "imatrix")) != "imatrix":
        raise _Broken(f"general.type {kind!r:.100}")
    if missing := [key for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE) if key not in metadata]:
        raise _Broken(f"no {' and no '.join(missing)}")
    datasets, chunks = metadata[_DATASETS], metadata[_CHUNK_COUNT]
    if not isinstance(datasets, list) or not all(isinstance(dataset, str) for dataset in datasets):
        raise _Broken(f"{_DATASETS} is not a list of strings")
    if header.types[_CHUNK_COUNT][0] != GGUFValueType.UINT32:
        raise _Broken(f"{_CHUNK_COUNT} is not a u32")

    def values(name: str) -> NDArray[np.float32]:
        tensor = tensors.get(name)
        if tensor is None:
            raise _Broken(f"no tensor {name!r}")
        if tensor.stored_as != "F32":
            raise _Broken(f"tensor {name!r} is {tensor.stored_as}, not F32")
        # Read from `content`, whose hash is recorded, and not from the file again.
        if tensor.stop > len(content):
            raise _Broken("the file shrank while it was read")
        return np.frombuffer(content, "<f4", (tensor.stop - tensor.start) // 4, tensor.start)

    names = sorted(
        {name.removesuffix(end) for name in tensors for end in (_SUMS, _COUNTS, _MEANS) if name.endswith(end)}
    )
    sums = {name: values(name + _SUMS) for name in names}
    counts = {name: values(name + _COUNTS) for name in names}
    entries = {name: _mean_square(name, sums[name], counts[name]) for name in names}
    entries = {name: entry for name, entry in entries.items() if entry.size}
    if not entries:
        raise _Broken(f"no tensor ends in {_SUMS}")
    unreached = {
        name: tuple(np.flatnonzero(of < 0.5).tolist()) for name, of in counts.items() if of.size > 1 and of.min() < 0.5
    }
    return _Contents(entries, tuple(datasets), chunks, unreached)


def _mean_square(name: str, sums: NDArray[np.float32], counts: NDArray[np.float32]) -> Importance:
    """Sums of squares of each matrix over its count, float32; ones where the count is 0."""
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise _Broken(f"entry {name!r} has counts that are negative or not finite")
    if not counts.size or sums.size % counts.size:
        raise _Broken(f"entry {name!r} has {sums.size:,} sums and {counts.size:,} counts")
    # llama-quantize rounds counts to whole numbers, halves away from zero, and divides by them in single precision.
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]
    matrices = sums.reshape(counts.size, -1)
    means = np.divide(matrices, whole, out=np.ones(matrices.shape, np.float32), where=whole > 0)
    return means.reshape(-1)


# Legacy


class _Legacy:
    """Reads values one after another; every length is checked against what is left."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def read(self) -> _Contents:
        count = self.number("number of entries")
        if not 1 <= count <= len(self.content) // 16:  # an entry takes 17 bytes and more
            raise _Broken(f"{count:,} entries in {len(self.content):,} bytes")
        entries: dict[str, Importance] = {}
        for _ in range(count):
            name, values = self.entry()
            if name in entries:
                raise _Broken(f"entry {name!r} occurs twice")
            entries[name] = values
        chunks = 0
        datasets: tuple[str, ...] = ()
        if self.at < len(self.content):  # files of old versions end here
            chunks = self.number("number of chunks")
            dataset = self.text("dataset")
            datasets = (dataset,) if dataset else ()
        if self.at < len(self.content):
            raise _Broken(f"{len(self.content) - self.at:,} bytes too many")
        return _Contents(entries, datasets, max(0, chunks))

    def entry(self) -> tuple[str, Importance]:
        name = self.text("name")
        calls, size = self.number(f"calls of {name!r}"), self.number(f"size of {name!r}")
        if not name or calls < 0 or size < 1:
            raise _Broken(f"entry {name!r} with {calls:,} calls and {size:,} values")
        values = np.frombuffer(self.take(4 * size, f"values of {name!r}"), "<f4").astype(np.float32)
        if calls:
            values /= np.float32(calls)
        return name, values

    def text(self, what: str) -> str:
        length = self.number(f"length of a {what}")
        if not 0 <= length <= MAX_TEXT:
            raise _Broken(f"a {what} of {length:,} bytes")
        raw = self.take(length, what)
        if b"\0" in raw:
            raise _Broken(f"a zero byte in a {what}")
        return raw.decode("utf-8", errors="backslashreplace")

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def take(self, length: int, what: str) -> bytes:
        raw = self.content[self.at : self.at + length]
        if len(raw) < length:
            raise _Broken(f"the file ends in the {what}")
        self.at += length
        return raw
