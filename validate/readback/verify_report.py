"""Results of inspect and verify, for people and for programs."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamquant.files.sizes import human_bytes
from streamquant.validate.readback.inspect import StoredFile
from streamquant.validate.readback.verify import VerifiedVariant


def verify_json(results: list[VerifiedVariant]) -> list[dict[str, Any]]:
    """One object a variant; SQNR in decibels, null where nothing was lost or no source was given."""
    return [
        {
            "folder": str(result.folder),
            "variant": result.spec,
            "ok": not result.problems,
            "problems": result.problems,
            "files": result.files,
            "tensors": result.tensors,
            "bytes": result.nbytes,
            "sqnr_db": _finite(result.total.sqnr_db) if result.noise else None,
            "max_error": result.total.max_error if result.noise else None,
            "rms_error": result.total.rms_error if result.noise else None,
        }
        for result in results
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verify_view(results: list[VerifiedVariant]) -> RenderableType:
    """A line a variant, and every problem."""
    table = Table("variant", box=None, header_style="bold", pad_edge=False)
    for column in ("files", "tensors", "size", "SQNR all", "SQNR quantized", "max error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("result")
    for result in results:
        noise = ("", "", "")
        if result.noise:
            noise = (_db(result.total.sqnr_db), _db(result.quantized.sqnr_db), f"{result.total.max_error:.2e}")
        verdict = Text("ok", "green") if not result.problems else Text(f"{len(result.problems)} problems", "bold red")
        table.add_row(
            f"{result.folder.name}: {result.spec}",
            str(result.files),
            str(result.tensors),
            human_bytes(result.nbytes),
            *noise,
            verdict,
        )
    problems = [Text(f"{result.spec}: {problem}", "red") for result in results for problem in result.problems]
    return Group(table, *problems)


def _db(value: float) -> str:
    return f"{value:.2f} dB" if math.isfinite(value) else "exact"


def inspect_json(files: list[StoredFile]) -> list[dict[str, Any]]:
    """Everything of every file; long arrays of the metadata (tokens, merges) by their length."""
    return [
        {
            "path": str(file.path),
            "size": file.size,
            "metadata": {key: _short(value) for key, value in file.metadata.items()},
            "tensors": [
                {
                    "name": t.name,
                    "stored_as": t.stored_as,
                    "shape": list(t.shape),
                    "nbytes": t.nbytes,
                    "offset": t.offset,
                }
                for t in file.tensors
            ],
        }
        for file in files
    ]


def _short(value: Any) -> Any:
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else value


def inspect_view(files: list[StoredFile], *, tensors: bool) -> RenderableType:
    """Metadata, types with their share of the bytes, and the tensors if asked for."""
    parts: list[RenderableType] = []
    for file in files:
        parts.append(Text(f"{file.path}  {human_bytes(file.size)}, {len(file.tensors)} tensors", "bold"))
        parts += [_metadata_table(file), _types_table(file)]
        if tensors:
            parts.append(_tensors_table(file))
    return Group(*parts)


def _metadata_table(file: StoredFile) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in file.metadata.items():
        text = str(_short(value)).replace("\n", "\\n")
        table.add_row(Text(f"  {key}"), Text(text if len(text) <= 160 else f"{text[:157]}..."))
    return table


def _types_table(file: StoredFile) -> Table:
    table = Table("  type", box=None, header_style="bold", pad_edge=False)
    for column in ("tensors", "size", "bits/weight"):
        table.add_column(column, justify="right")
    for stored_as in sorted({tensor.stored_as for tensor in file.tensors}):
        members = [tensor for tensor in file.tensors if tensor.stored_as == stored_as]
        nbytes, count = sum(t.nbytes for t in members), sum(t.count for t in members)
        table.add_row(f"  {stored_as}", str(len(members)), human_bytes(nbytes), f"{8 * nbytes / max(count, 1):.2f}")
    return table


def _tensors_table(file: StoredFile) -> Table:
    table = Table("  tensor", "type", "shape", box=None, header_style="bold", pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("offset", justify="right")
    for tensor in file.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(f"  {tensor.name}", tensor.stored_as, shape, f"{tensor.nbytes:,}", f"{tensor.offset:,}")
    return table
