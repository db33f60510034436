"""All benchmarks: `python -m benchmarks.run [--quick] [--only NAME] [--work FOLDER]`.

A full run writes docs/benchmarks.md. --only measures some sections again and leaves the others on the page as they were
(they are kept beside the page's sources in .cache/benchmarks.json). A quick run has small checkpoints and few repeats,
shows that everything works, proves nothing, and only prints.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import conversions, encoders, hub, memory, mixes, mixtures, schemes, validation
from benchmarks.conversions import Setting
from benchmarks.page import Section, Target, page
from tests.peers import ROOT

BENCHMARKS = {
    "fp8": conversions.fp8,
    "schemes": schemes.schemes,
    "gguf": conversions.gguf,
    "q4_k_m": mixes.q4_k_m,
    "ladder": mixes.ladder,
    "one-pass": conversions.one_pass,
    "mixtures": mixtures.mixtures,
    "hub": hub.hub,
    "memory": memory.memory,
    "kernels": encoders.encoders,
    "validation": validation.validation,
}
PAGE = ROOT / "docs" / "benchmarks.md"
CACHE = ROOT / ".cache"
KEPT = "benchmarks.json"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small checkpoints, one repeat; only prints")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="repeatable; default: all")
    parser.add_argument("--work", type=Path, default=CACHE, help="where checkpoints and outputs go for a while")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; default: %(default)s")
    arguments = parser.parse_args()
    for folder in (arguments.work, CACHE):
        folder.mkdir(parents=True, exist_ok=True)
    sections = {} if arguments.quick or not arguments.only else read_sections(CACHE / KEPT)
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=arguments.work) as folder:
        setting = Setting(Path(folder).resolve(), arguments.quick)
        for name in arguments.only or BENCHMARKS:
            print(f"== {name}", flush=True)
            sections[name] = BENCHMARKS[name](setting)
            print(sections[name].markdown(), flush=True)
            if not arguments.quick:
                write_sections(CACHE / KEPT, sections)
                arguments.page.write_text(page(ordered(sections)))
    for section in ordered(sections):
        for missed in (target for target in section.targets if not target.met):
            print(f"missed: {missed.what}: {missed.found}, target {missed.required}", file=sys.stderr)


def ordered(sections: dict[str, Section]) -> list[Section]:
    """The sections in the order of the page."""
    return [sections[name] for name in BENCHMARKS if name in sections]


def read_sections(path: Path) -> dict[str, Section]:
    """The sections of earlier runs."""
    if not path.exists():
        return {}
    return {
        name: Section(kept["title"], kept["blocks"], [Target(**target) for target in kept["targets"]])
        for name, kept in json.loads(path.read_text()).items()
    }


def write_sections(path: Path, sections: dict[str, Section]) -> None:
    """Keep the sections for a later run."""
    path.write_text(json.dumps({name: dataclasses.asdict(section) for name, section in sections.items()}, indent=1))


if __name__ == "__main__":
    main()
