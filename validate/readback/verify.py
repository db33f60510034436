"""Read back what was written: against the manifest, and against the source.

Without a source: sizes, SHA-256 of every file, the hash of every tensor (so that damage has a name), and containers
whose headers say what the manifest says. With the source: every tensor is encoded again and compared byte for byte, and
decoded and compared with the weights, which gives the error of the variant (SQNR).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamquant.convert.manifest import MANIFEST, read_manifest
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import BLOCK_WEIGHTS, Chunk, Matrix, Plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.recipes.overrides import parse_overrides
from streamquant.convert.recipes.recipe import Recipe, parse_variants, recipe_of
from streamquant.convert.recipes.recipe_file import parse_recipe
from streamquant.convert.run.blocks import Piece, Scratch, encode_chunk, read_into, read_rows, widen_rows
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.hashing import FileHash
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS
from streamquant.validate.readback.inspect import StoredFile, inspect_file
from streamquant.validate.readback.sqnr import Noise


@dataclass(slots=True)
class VerifiedVariant:
    """What was found of one variant; `problems` is empty if all is well."""

    folder: Path
    spec: str
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    noise: dict[str, Noise] = field(default_factory=dict)
    """By source tensor; empty without a source."""

    @property
    def total(self) -> Noise:
        """The noise of the whole variant."""
        total = Noise()
        for noise in self.noise.values():
            total.merge(noise)
        return total

    @property
    def quantized(self) -> Noise:
        """The noise of the tensors that lost something."""
        total = Noise()
        for noise in self.noise.values():
            if noise.noise > 0:
                total.merge(noise)
        return total


def find_manifests(folder: Path) -> list[Path]:
    """The folders with a manifest: `folder` itself, or those directly below it. Raises UsageError if there is none."""
    candidates = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())] if folder.is_dir() else []
    found = [candidate for candidate in candidates if (candidate / MANIFEST).is_file()]
    if not found:
        raise UsageError(
            "nothing to verify",
            where=str(folder),
            required=f"a folder that `streamquant convert` wrote, with {MANIFEST}",
        )
    return found


def verify(
    folder: Path,
    source: Checkpoint | None = None,
    imatrix: ImportanceMatrix | None = None,
    *,
    on_progress: Callable[[int], None] = lambda _nbytes: None,
) -> list[VerifiedVariant]:
    """Verify every variant of every manifest in `folder`; `on_progress` gets the number of bytes just checked.

    `imatrix` is what the variants were made with, needed to encode them again. Problems are collected, not raised.
    Raises UsageError without a manifest or with a missing or another importance matrix, StreamquantError for a broken
    manifest or a source that cannot be read.
    """
    results = []
    manifests = [(child, read_manifest(child)) for child in find_manifests(folder)]
    if source is not None:
        for child, manifest in manifests:
            for spec, entry in _variants(manifest or {}, child):
                _ = _same_imatrix(entry, imatrix, f"{child / MANIFEST}, variant {spec!r}")
    for child, manifest in manifests:
        assert manifest is not None, "find_manifests returns folders with one"
        for spec, entry in _variants(manifest, child):
            result = VerifiedVariant(child, spec)
            results.append(result)
            _verify_files(result, entry, on_progress)
            if source is not None and not result.problems:
                found = _same_imatrix(entry, imatrix, str(child))
                _verify_source(result, manifest, entry, (source, found), on_progress)
    return results


def bytes_to_verify(folder: Path, *, with_source: bool) -> int:
    """The number of bytes that `verify` will report, for a progress bar."""
    total = 0
    for child in find_manifests(folder):
        manifest = read_manifest(child) or {}
        for _, entry in _variants(manifest, child):
            size = sum(file["size"] for file in entry["files"])
            total += 2 * size if with_source else size
    return total


_PART = {"name": str, "file": str, "offset": int, "size": int, "xxh3_128": str, "stored_as": str}


def _variants(manifest: dict[str, Any], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The variants of a manifest, checked for what is used of them."""
    for spec, entry in manifest["variants"].items():
        try:
            for file in entry["files"]:
                if not isinstance(file["size"], int) or not isinstance(file["sha256"], str):
                    raise TypeError("files")
                if Path(file["path"]).is_absolute() or ".." in Path(file["path"]).parts:
                    raise ValueError(f"path {file['path']!r} leaves the folder")
            for tensor in entry["tensors"]:
                for part in tensor["parts"]:
                    for key, kind in _PART.items():
                        if not isinstance(part[key], kind):
                            raise TypeError(f"{key} of a tensor: {part[key]!r:.100}")
            _ = _options(entry), _recipe(spec, entry)
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise StreamquantError(
                "broken manifest", where=f"{folder / MANIFEST}, variant {spec!r}", found=repr(error)
            ) from error
        yield spec, entry


def _options(entry: dict[str, Any]) -> ConversionOptions:
    """The options that a variant was made with. Raises KeyError or TypeError if they are not what a manifest holds."""
    options = entry["options"]
    for key, kinds in {"name": str, "split_max_size": int, "max_shard_size": int, "pre": str, "metadata": dict}.items():
        if options[key] is not None and not isinstance(options[key], kinds):
            raise TypeError(f"option {key}: {options[key]!r}")
    record, overrides = options.get("imatrix"), options.get("overrides") or {}
    if record is not None and not all(isinstance(record[key], kind) for key, kind in _IMATRIX.items()):
        raise TypeError(f"option imatrix: {record!r:.100}")
    if not isinstance(overrides, dict):
        raise TypeError(f"option overrides: {overrides!r:.100}")
    return ConversionOptions(
        options["name"],
        options["split_max_size"],
        options["max_shard_size"],
        options["pre"],
        options["metadata"] or {},
        overrides=parse_overrides(overrides, lambda key: f"manifest, {key}"),
        guard_template=bool(options.get("guard_template")),
    )


_IMATRIX = {"file": str, "sha256": str, "include_weights": list, "exclude_weights": list}


def _recipe(spec: str, entry: dict[str, Any]) -> Recipe:
    """The recipe of a variant, from the record of its recipe file if it has one. Raises UsageError."""
    if (record := entry.get("recipe")) is not None:
        return recipe_of(parse_recipe(record, "recipe"))
    return parse_variants([spec])[0]


def _same_imatrix(entry: dict[str, Any], imatrix: ImportanceMatrix | None, where: str) -> ImportanceMatrix | None:
    """The importance matrix that a variant was made with, under its name then. Raises UsageError if it is another."""
    record = entry["options"].get("imatrix")
    if record is None:
        return None
    if imatrix is None or imatrix.sha256 != record["sha256"]:
        raise UsageError(
            "made with an importance matrix, and so can only be encoded again with it",
            where=where,
            found="none" if imatrix is None else f"{imatrix.name}, SHA-256 {imatrix.sha256}",
            required=f"--imatrix with {record['file']}, SHA-256 {record['sha256']}",
        )
    return replace(imatrix, name=record["file"]).select(record["include_weights"], record["exclude_weights"])


# Against the manifest


def _verify_files(result: VerifiedVariant, entry: dict[str, Any], on_progress: Callable[[int], None]) -> None:
    for file in entry["files"]:
        path = result.folder / file["path"]
        parts = [
            (part["name"], part["offset"], part["offset"] + part["size"], part["xxh3_128"], part["stored_as"])
            for tensor in entry["tensors"]
            for part in tensor["parts"]
            if part["file"] == file["path"]
        ]
        result.files += 1
        result.tensors += len(parts)
        if not path.is_file():
            result.problems.append(f"{file['path']}: missing")
            continue
        result.nbytes += path.stat().st_size
        if path.stat().st_size != file["size"]:
            result.problems.append(f"{file['path']}: {path.stat().st_size:,} bytes, should be {file['size']:,}")
            continue
        result.problems += _verify_hashes(path, file, parts, on_progress)
        result.problems += _verify_header(path, file["path"], parts)


def _verify_hashes(
    path: Path, file: dict[str, Any], parts: list[tuple[str, int, int, str, str]], on_progress: Callable[[int], None]
) -> list[str]:
    found = FileHash(file["size"], [], [(name, start, stop) for name, start, stop, _, _ in parts])
    with path.open("rb") as opened:
        at = 0
        while (step := found.step()) is not None and at < file["size"]:
            found.hash(opened.fileno(), step[1])
            found.busy = False
            on_progress(step[1] - at)
            at = step[1]
    hashes = found.tensor_hashes()
    damaged = [name for name, _, _, expected, _ in parts if hashes[name] != expected]
    if found.sha256() == file["sha256"]:
        return [
            f"{file['path']}: tensor {name} has another hash in the manifest; the file is whole" for name in damaged
        ]
    if not damaged:
        return [f"{file['path']}: header or padding damaged (SHA-256 differs, all tensors are whole)"]
    return [f"{file['path']}: tensor {name} is damaged" for name in damaged]


def _verify_header(path: Path, name: str, parts: list[tuple[str, int, int, str, str]]) -> list[str]:
    """Whether the container says of each tensor what the manifest says."""
    try:
        stored: StoredFile = inspect_file(path)
    except StreamquantError as error:
        return [f"{name}: {error}"]
    present = {tensor.name: tensor for tensor in stored.tensors}
    problems = []
    for tensor_name, start, stop, _, stored_as in parts:
        tensor = present.get(tensor_name)
        if tensor is None:
            problems.append(f"{name}: no tensor {tensor_name} in the file's header")
        elif (tensor.offset, tensor.offset + tensor.nbytes, tensor.stored_as) != (start, stop, stored_as):
            problems.append(f"{name}: tensor {tensor_name} has another place or type in the file's header")
    return problems


# Against the source


def _verify_source(
    result: VerifiedVariant,
    manifest: dict[str, Any],
    entry: dict[str, Any],
    made_of: tuple[Checkpoint, ImportanceMatrix | None],
    on_progress: Callable[[int], None],
) -> None:
    source, imatrix = made_of
    expected = {(file["path"], file["size"]) for file in manifest["source"]["files"]}
    if {(file.name, file.size) for file in source.files} != expected:
        result.problems.append(f"made of another source than {source.folder}: names or sizes of its files differ")
        return
    plan = make_plan(source, [_recipe(result.spec, entry)], replace(_options(entry), imatrix=imatrix))
    with ExitStack() as stack:
        outputs = []
        for file in plan.files:
            # the folder may have been renamed since
            path = result.folder / file.path.removeprefix(f"{plan.variants[0].folder}/")
            if path.stat().st_size != file.size:  # then all addresses are others
                result.problems.append(
                    f"{file.path}: {path.stat().st_size:,} bytes, of {source.folder} it would be {file.size:,}: the "
                    f"header is another (model card, tokenizer, config, or the folder's name, which is the model's)"
                )
                return
            opened = stack.enter_context(path.open("rb"))
            outputs.append(opened.fileno())
            for offset, data in file.literals:
                if os.pread(opened.fileno(), len(data), offset) != data:
                    result.problems.append(f"{file.path}: header or generated tensor at byte {offset} differs")
        sources = {
            file.name: stack.enter_context((source.folder / file.name).open("rb")).fileno() for file in source.files
        }
        scratch, compared = Scratch(), Scratch()
        for chunk in plan.chunks:
            _verify_chunk(plan, chunk, sources, outputs, result, scratch, compared, on_progress)


def _verify_chunk(
    plan: Plan,
    chunk: Chunk,
    sources: dict[str, int],
    outputs: list[int],
    result: VerifiedVariant,
    scratch: Scratch,
    compared: Scratch,
    on_progress: Callable[[int], None],
) -> None:
    """Encode a chunk again, compare it with the file, and add up the error of what the file holds."""
    matrix = plan.matrices[chunk.matrix]
    source = sources[matrix.source.file]
    step = matrix.rows_within(BLOCK_WEIGHTS)
    noise = result.noise.setdefault(matrix.source.name, Noise())
    first = chunk.first
    for pieces in encode_chunk(plan, chunk, source, frozenset(range(len(matrix.outputs))), scratch):
        last = min(first + step, chunk.last)
        stored = [_read_piece(piece, outputs, compared) for piece in pieces]
        for piece, found in zip(pieces, stored, strict=True):
            if not np.array_equal(piece.data, found):
                name = matrix.outputs[piece.output].name
                result.problems.append(
                    f"{plan.files[piece.file].path}: tensor {name}, rows from {first}: not what the source gives"
                )
            on_progress(found.size)
        rows = widen_rows(matrix, first, read_rows(matrix, first, last, source, scratch), scratch)
        noise.add(rows, _decode(matrix, pieces, stored))
        first = last


def _read_piece(piece: Piece, outputs: list[int], compared: Scratch) -> np.ndarray[Any, np.dtype[np.uint8]]:
    buffer = compared.take(f"part {piece.part}", piece.data.size)
    read_into(outputs[piece.file], buffer, piece.offset)
    return buffer


def _decode(
    matrix: Matrix, pieces: list[Piece], stored: list[np.ndarray[Any, np.dtype[np.uint8]]]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The rows that the stored bytes stand for, in the source's row order."""
    output = matrix.outputs[pieces[0].output]
    format_ = FORMATS[output.format]
    parts = tuple(
        found.reshape(-1, part.bytes_per_entry(matrix.n)) for part, found in zip(format_.parts, stored, strict=True)
    )
    rows = format_.decode(parts, matrix.n)
    if output.rope_heads is None:
        return rows
    half = matrix.rows // output.rope_heads // 2
    return rows.reshape(-1, half, 2, matrix.n).swapaxes(1, 2).reshape(rows.shape)
