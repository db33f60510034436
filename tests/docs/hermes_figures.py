"""The figures in docs/hermes-4.md: from the plans of the releases in examples/, and from docs/benchmarks.md.

`python -m tests.docs.hermes_figures` writes them again; tests/docs/test_hermes_figures.py tells when that is needed.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from streamquant.convert.architectures import TensorKind
from streamquant.convert.plan.disk import peak_disk
from streamquant.convert.plan.records import Plan
from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.convert.source.spool import GIB
from streamquant.files.sizes import human_bytes
from streamquant.publish.release.release_file import read_release
from streamquant.publish.release.release_run import ReleaseRun
from streamquant.publish.release.release_state import ReleaseState
from streamquant.publish.release.stages.imatrix import expected_imatrix
from streamquant.publish.upload.options import ROOM
from tests import gguf_peer
from tests.example_figures import EXAMPLES, JOBS
from tests.shapes import SHAPES, write_shape

DOCS = Path(__file__).parents[2] / "docs"
PAGE, BENCHMARKS = DOCS / "hermes-4.md", DOCS / "benchmarks.md"
BEGIN, END = "<!-- figures -->\n", "<!-- figures end -->\n"
SPOOL_GIB = 60
LINE = 125_000_000
"""Bytes a second of a line of 1 Gbit/s."""
FILES_TEXT = """\
In brackets: files, where there are several; FP8 has the shards of the source.
"""
DISK_TEXT = """\
All variants above, in one run. A spool is {gib} GiB here (`--spool-gib {gib}`), or the whole source where that is less.
The release computes an importance matrix and validates, and so reads the source as a whole. In the last row GGUF
files grow all at once, FP8 shards come and go.
"""
MEMORY_TEXT = """\
Of `convert` the plan's estimate. `validate` and `imatrix` hold two layers at a time (BF16 on a GPU, float32 on a CPU),
then the head, and hidden states beside them; the sections `engines` and `behaviour` hold the whole variant.
"""
TIME_TEXT = """\
**Arithmetic, not measurement**: no model of this size was converted on the machine of the benchmarks. A time is the
bytes of the source over a rate of [benchmarks.md](benchmarks.md), measured on two cores: {fp8:.0f} MB of source a CPU
second for `fp8-dynamic`, {ladder:.1f} for nine GGUF types at once, without an importance matrix (with one, some
encoders take twice as long). Cores help until the disk or the network is the limit. The time of validation was not
measured on these models either: it grows with weights x tokens, and with each variant.
"""
RELEASES = {
    "Hermes-4-14B": "hermes-4-14b.yaml",
    "Hermes-4.3-36B": "hermes-4.3-36b.yaml",
    "Hermes-4-70B": "hermes-4-70b.yaml",
    "Hermes-4-405B": "hermes-4-405b.yaml",
}


@dataclass(frozen=True, slots=True)
class Size:
    """One of the models, and the plan of its release."""

    checkpoint: Checkpoint
    plan: Plan

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        return sum(tensor.count for name, tensor in self.checkpoint.tensors.items() if ".layers.0." in name)

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix."""
        return max(
            self.checkpoint.tensors[hf].count
            for hf, rule in self.plan.model.rules.items()
            if rule.kind is not TensorKind.LINEAR and rule.gguf_name == "output.weight"
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What docs/benchmarks.md measured: bytes of source per CPU second."""

    fp8: float
    ladder: float


def plan_of(name: str, checkpoint: Checkpoint) -> Size:
    """The plan of the release of a model, with an importance matrix where it has one."""
    file = replace(read_release(EXAMPLES / RELEASES[name]), model=str(checkpoint.folder))
    run = ReleaseRun(file, ReleaseState(Path("/nonexistent")))
    stage = file.imatrix
    imatrix = expected_imatrix(checkpoint, f"{name}.imatrix.gguf", stage) if stage else None
    return Size(checkpoint, run.plan(imatrix))


def read_rates(text: str) -> Rates:
    """From the page of the benchmarks: the steady rate of fp8-dynamic, and that of the ladder of file types."""
    fp8 = section(text, "fp8-dynamic").partition("steady MB/CPU s")[2]
    steady = _cells(fp8)[4]
    ladder = _cells(section(text, "The ladder of file types from one read"))
    seconds, cpu, rate = float(ladder[1]), float(ladder[3]), float(ladder[6].replace(",", ""))
    return Rates(float(steady.replace(",", "")) * 1e6, seconds * rate * 1e6 / cpu)


def section(text: str, title: str) -> str:
    """The text below a heading."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _cells(text: str) -> list[str]:
    """Cells of the first row about streamquant; [0] is its name, counted from 0."""
    row = re.search(r"^\| streamquant \|(.*)\|$", text, re.MULTILINE)
    assert row is not None, "no row about streamquant"
    return ["streamquant", *(cell.strip() for cell in row[1].split("|"))]


def figures(sizes: Mapping[str, Size], rates: Rates) -> str:
    """The tables and their explanations."""
    return "\n".join([_files(sizes), _disk(sizes), _memory(sizes), _time(sizes, rates)])


def _table(first: str, rows: list[tuple[str, list[str]]], names: Mapping[str, Size]) -> str:
    short = [name.removeprefix("Hermes-") for name in names]
    lines = [f"| {first} | {' | '.join(short)} |", f"| --- |{' ---: |' * len(short)}"]
    return "\n".join([*lines, *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows)]) + "\n"


def _row(label: str, sizes: Mapping[str, Size], cell: Callable[[Size], str]) -> tuple[str, list[str]]:
    return label, [cell(size) for size in sizes.values()]


def _bytes_of(size: Size, spec: str) -> str:
    variant = next((variant for variant in size.plan.variants if variant.recipe.spec == spec), None)
    if variant is None:
        return ""
    files = f" ({len(variant.files)})" if len(variant.files) > 1 and spec.startswith("gguf") else ""
    return human_bytes(size.plan.variant_bytes(variant)) + files


def _files(sizes: Mapping[str, Size]) -> str:
    order = [f"gguf:{name}" for name in ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M")]
    assert {"fp8-dynamic", *order} == {v.recipe.spec for size in sizes.values() for v in size.plan.variants}
    rows = [
        _row("weights", sizes, lambda size: f"{size.checkpoint.parameter_count / 1e9:.2f} B"),
        _row("source, BF16", sizes, lambda s: f"{human_bytes(s.checkpoint.nbytes)} ({len(s.checkpoint.files)})"),
        *((f"`{spec}`", [_bytes_of(size, spec) for size in sizes.values()]) for spec in ("fp8-dynamic", *order)),
    ]
    return f"## Files\n\n{FILES_TEXT}\n{_table('', rows, sizes)}"


def _disk(sizes: Mapping[str, Size]) -> str:
    def spool(size: Size) -> int:
        return min(size.checkpoint.nbytes, SPOOL_GIB * GIB)

    def whole(size: Size) -> int:
        return sum(file.size for file in size.checkpoint.files)

    def delivered(size: Size) -> int:
        peak = peak_disk(size.plan, ROOM, spool(size), delete=True, jobs=JOBS)
        return min(peak, size.plan.nbytes + spool(size))  # as publish/upload/streaming.py, which takes a remote source

    rows = [
        _row("the release: results, and the whole source", sizes, lambda s: human_bytes(s.plan.nbytes + whole(s))),
        _row("`convert` from a folder: results", sizes, lambda s: human_bytes(s.plan.nbytes)),
        _row("`convert` from the Hub: results and spool", sizes, lambda s: human_bytes(s.plan.nbytes + spool(s))),
        _row("`convert --push --delete-after-upload`", sizes, lambda s: human_bytes(delivered(s))),
    ]
    return f"## Disk\n\n{DISK_TEXT.format(gib=SPOOL_GIB)}\n{_table('at most', rows, sizes)}"


def _memory(sizes: Mapping[str, Size]) -> str:
    rows = [
        _row(f"`convert`, {JOBS} jobs", sizes, lambda size: human_bytes(size.plan.memory_bytes(JOBS))),
        _row("`convert`, 4 jobs", sizes, lambda size: human_bytes(size.plan.memory_bytes(4))),
        _row("two layers in BF16", sizes, lambda size: human_bytes(2 * 2 * size.layer_weights)),
        _row("two layers in float32", sizes, lambda size: human_bytes(2 * 4 * size.layer_weights)),
        _row("the head in float32", sizes, lambda size: human_bytes(4 * size.head_weights)),
    ]
    return f"## Memory\n\n{MEMORY_TEXT}\n{_table('', rows, sizes)}"


def _time(sizes: Mapping[str, Size], rates: Rates) -> str:
    def hours(seconds: float) -> str:
        return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"

    def cpu(rate: float) -> Callable[[Size], str]:
        return lambda size: hours(size.checkpoint.nbytes / rate)

    rows = [
        _row("`fp8-dynamic`: one core", sizes, cpu(rates.fp8)),
        _row("nine GGUF types: one core", sizes, cpu(rates.ladder)),
        _row(f"nine GGUF types: {JOBS} such cores, if all else keeps up", sizes, cpu(rates.ladder * JOBS)),
        _row("fetching the source at 1 Gbit/s", sizes, lambda size: hours(size.checkpoint.nbytes / LINE)),
        _row("uploading the variants above at 1 Gbit/s", sizes, lambda size: hours(size.plan.nbytes / LINE)),
    ]
    text = TIME_TEXT.format(fp8=rates.fp8 / 1e6, ladder=rates.ladder / 1e6)
    return f"## Time\n\n{text}\n{_table('', rows, sizes)}"


def with_figures(text: str, made: str) -> str:
    """The page with other figures."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Write the figures of the page again."""
    data = gguf_peer.data_folder()
    if data is None:
        sys.stderr.write("no shared test data: set STREAMQUANT_DATA\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        sizes = {
            name: plan_of(name, open_checkpoint(write_shape(SHAPES[name], Path(folder) / name, data)))
            for name in RELEASES
        }
        made = figures(sizes, read_rates(BENCHMARKS.read_text()))
    PAGE.write_text(with_figures(PAGE.read_text(), made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
