"""The page that a run writes: sections of Markdown with their targets and whether they are met."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import CORES, Results, Sample

PACKAGES = ("streamquant", "llmcompressor", "compressed-tensors", "torch", "xllamacpp", "numba", "numpy")
INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks.run`); do not edit. Each section is one run, in which streamquant and its
peers take turns, each in a fresh process with all of its defaults, all cores allowed, the source in the page cache, the
output on the same file system and removed between runs. A time is the best of the runs, with the shortest and the
longest beside it. CPU seconds are user and system time of the process and its children. Memory is the peak of what the
whole process tree has resident, anonymous and file pages, sampled every 20 ms, or the kernel's own peak of the largest
process, whichever is more. Ratios compare runs of the same section: the machine is shared, and each section says how
much of it others were using; "x CPU" hardly depends on that. `streamquant` runs with warm caches (compiled kernels,
quantization_config), except where a row says "first run".
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what came of it."""

    what: str
    required: str
    found: str
    met: bool
    why: str = ""
    """Where it was missed: where the time goes."""


@dataclass(slots=True)
class Section:
    """One benchmark on the page."""

    title: str
    blocks: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def markdown(self) -> str:
        """The section as text."""
        return f"## {self.title}\n\n" + "\n\n".join(block.strip() for block in self.blocks) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    line = "| --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([_row(header), line, *(_row(row) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def results_table(results: Results, base: str, read: int) -> str:
    """The runs of all contenders, as multiples of `base`."""
    rows = []
    for name in results.samples:
        best: Sample = results.best(name)
        rows.append(
            [
                name,
                f"{best.wall:.2f}",
                results.spread(name),
                f"{results.cpu(name):.2f}",
                mebibytes(results.resident(name)),
                f"{best.written / 1e9:.2f}",
                f"{read / best.wall / 1e6:,.0f}",
                f"{best.wall / results.wall(base):.2f}",
                f"{results.cpu(name) / results.cpu(base):.2f}",
            ]
        )
    header = ["", "seconds", "spread", "CPU s", "MiB", "GB written", "source MB/s", "x time", "x CPU"]
    return table(header, rows)


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:,.0f}"


def others(results: Results) -> str:
    """How busy the machine was otherwise."""
    return f"Other processes took {results.others:.0%} of the machine's cores meanwhile."


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    parts = [INTRODUCTION, _machine(), "## Targets\n\n" + _targets(sections)]
    return "\n".join([*parts, *(section.markdown() for section in sections)])


def _targets(sections: Sequence[Section]) -> str:
    targets = [target for section in sections for target in section.targets]
    rows = [[t.what, t.required, t.found, "met" if t.met else "**missed**"] for t in targets]
    text = table(["", "target", "found", ""], rows) + "\n"
    for target in targets:
        if not target.met:
            text += f"\n**{target.what}**: {target.why or 'see below'}\n"
    return text


def _machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    flags = Path("/proc/cpuinfo").read_text()
    gibibytes = int(memory.split()[1]) / 2**20
    extensions = [name for name in ("avx2", "avx512f", "sha_ni") if name in flags]
    return (
        f"Machine: {model}, {CORES} cores ({', '.join(extensions)}), {gibibytes:.0f} GiB of memory, "
        f"{platform.system()}. Python {platform.python_version()}, {versions()}.\n"
    )


def versions() -> str:
    """Versions of what is compared."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} (not installed)")
    return ", ".join(found)
