"""What a report says: the records of report.json, and nothing that rendering would have to look up elsewhere."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamquant.files.machine import usable_cores
from streamquant.files.records import from_json, to_json
from streamquant.files.strict_json import read_record
from streamquant.files.writing import explain, write_atomically
from streamquant.model.problem import Problem
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.printable import visible
from streamquant.validate.engines.agreement import EngineAgreement
from streamquant.validate.gates import GateResult, Gates, failed
from streamquant.validate.logits.comparison import Comparison, VariantResult
from streamquant.validate.readback.measured_files import MeasuredFile
from streamquant.validate.sections import Section
from streamquant.validate.text.behaviour import BehaviourReport
from streamquant.validate.text.chat import ChatReport
from streamquant.validate.text.template_lints import Lint
from streamquant.validate.text.tokens import TokenReport

SCHEMA = 2
"""Version of report.json, the only one that is read. It goes up with every change but a new field with a default."""
REPORT = "report.json"
MAX_BYTES = 1 << 30
OTHER_VERSION = "validate again, or render with the version that wrote it"


@dataclass(frozen=True, slots=True)
class NotRun:
    """A section that did not run, and why. variant: its label, or None for all."""

    section: Section
    variant: str | None
    reason: str
    requested: bool = False
    """Left out because the options say so."""
    nothing_to_check: bool = False
    """The original has nothing of the kind, such as a chat template."""

    @property
    def unchecked(self) -> bool:
        """Whether something remains that nobody has looked at, and nobody wanted to leave out."""
        return not self.requested and not self.nothing_to_check


@dataclass(frozen=True, slots=True)
class VariantReport:
    """Everything about one variant. A section that did not run is None, and says why in Report.not_run."""

    label: str
    path: str
    """As opened: of a split set the first file. The key to `Report.measured`."""
    files: tuple[MeasuredFile, ...]
    """With its weights: what tells the variant that was measured from a later one of the same name."""
    problems: tuple[Problem, ...]
    """Of all sections, those of the comparison included."""
    tokens: TokenReport | None
    chat: ChatReport | None
    lints: tuple[Lint, ...] | None
    """Without those that the original has too."""
    engine: EngineAgreement | None
    behaviour: BehaviourReport | None

    @property
    def errors(self) -> int:
        """Problems of severity error."""
        return sum(problem.severity == "error" for problem in self.problems)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured."""

    system: str
    python: str
    cpu: str
    cores: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """The whole report; see docs/report.md. A notebook shows it as its verdict and the table of variants."""

    schema: int
    created: str
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    """The command line, without the path of the program."""
    versions: Mapping[str, str]
    """Of streamquant and of all packages and engines that took part."""
    machine: Machine
    comparison: Comparison
    """Its variants are those that could be read."""
    original_files: tuple[MeasuredFile, ...]
    variants: tuple[VariantReport, ...]
    """All, in the order of the command."""
    original_lints: tuple[Lint, ...] | None
    not_run: tuple[NotRun, ...]
    gates: Gates
    gate_results: tuple[GateResult, ...]

    def measured(self, variant: VariantReport) -> VariantResult | None:
        """What the comparison says of a variant; None if it could not be read."""
        return next((found for found in self.comparison.variants if found.model.path == variant.path), None)

    @property
    def errors(self) -> int:
        """Problems of severity error of all variants."""
        return sum(variant.errors for variant in self.variants)

    def __repr__(self) -> str:
        count, gates = len(self.variants), len(failed(self.gate_results))
        variants = "1 variant" if count == 1 else f"{count} variants"
        found = f"{self.errors} errors, {gates} failed gates"
        return f"<Report: {variants} of {visible(self.comparison.original.model.label)}, {found}>"

    def _repr_html_(self) -> str:
        from streamquant.validate.report.render import render_summary  # jinja2 and the plots are not needed before

        return render_summary(self)


@dataclass(frozen=True, slots=True)
class ChatCheck:
    """What `chat_check` found."""

    variants: tuple[VariantReport, ...]
    original_lints: tuple[Lint, ...]
    """Known faults of the original's own chat template."""
    not_run: tuple[NotRun, ...]

    @property
    def errors(self) -> int:
        """Problems of severity error of all variants."""
        return sum(variant.errors for variant in self.variants)


def this_machine() -> Machine:
    """The machine that runs this."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        cpu=cpu or platform.processor() or platform.machine(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write report.json into a folder, which is made. Raises StreamquantError if that fails."""
    data = report_bytes(report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / REPORT, data)
    except OSError as error:
        raise explain(error, folder) from error
    return folder / REPORT


def report_bytes(report: Report) -> bytes:
    """The text of report.json."""
    text = json.dumps(to_json(report, "report"), ensure_ascii=False, allow_nan=False, indent=1)
    # a lone surrogate, which a hostile template can put into a text, is no UTF-8
    return f"{text}\n".encode(errors="replace")


def read_report(path: str | Path) -> Report:
    """Read report.json, or that of a folder.

    Raises UsageError if there is none, StreamquantError if it is of another version or not what its types say.
    """
    path = Path(path)
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise UsageError("no report", where=str(file), required="a folder that validate wrote, or its report.json")
    record = read_record(file, OTHER_VERSION, MAX_BYTES)
    if record.get("schema") != SCHEMA:
        raise StreamquantError(
            "a report of another version",
            where=str(file),
            found=f"schema {record.get('schema')!r:.40}",
            required=f"schema {SCHEMA}",
            hint=OTHER_VERSION,
        )
    return from_json(Report, record, str(file), OTHER_VERSION)


def check_report_folder(folder: Path) -> None:
    """Raise UsageError if a folder holds other things than a report: nothing of theirs is to be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UsageError("not a folder", where=str(folder), hint="choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).is_file():
        raise UsageError(
            "the folder for the report holds other files", where=str(folder), required="a new or empty folder, or one "
            "with an earlier report, which is replaced", hint="choose another --out",
        )  # fmt: skip
