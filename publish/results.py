"""What lies in a variant folder: the manifest, and what a report says of exactly these bytes.

Model cards and uploads read the same records. A report counts for a variant if it names files of the same names, sizes
and hashes as the manifest; a report of earlier bytes, or of bytes that nobody can name, counts for nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from streamquant.convert.manifest import MANIFEST, ManifestFile, ManifestSource, ManifestVariant, read_manifest
from streamquant.convert.recipes.container import Container
from streamquant.files.folders import real_path
from streamquant.files.hashing import sha256_of
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.gates import GateResult
from streamquant.validate.logits.comparison import VariantResult
from streamquant.validate.readback.measured_files import MeasuredFile
from streamquant.validate.report.data import REPORT, Report, VariantReport, read_report

REPORT_FOLDER = "report"
"""Where a report is looked for, below the --out folder and below a variant folder; and its name in a repository."""
CARD = "README.md"
MATRIX = re.compile(r"\w[\w.+ -]{0,200}\.(gguf|dat)", re.ASCII)
"""Names of importance matrices."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a report says of a variant, whose bytes it read."""

    report: Report
    variant: VariantReport
    result: VariantResult | None
    """Of the comparison; None if the variant could not be read."""
    gates: tuple[GateResult, ...]
    """Of this variant alone."""
    against_source: bool
    """Whether the original of the report is the source of the variant, by names and sizes of its files."""

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """The gates that this variant did not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)

    @property
    def errors(self) -> int:
        """Problems of severity error."""
        return self.variant.errors

    @property
    def passed(self) -> bool:
        """Whether the variant was measured and passed every gate that was set."""
        return self.result is not None and not self.failed_gates


@dataclass(frozen=True, slots=True)
class PublishedVariant:
    """A variant of a manifest, and what was measured of it."""

    made: ManifestVariant
    measurement: Measurement | None = None
    why_not: str | None = None
    """A sentence, without a full stop, where there is no measurement."""

    @property
    def spec(self) -> str:
        """As on the command line: "fp8-dynamic", "gguf:Q4_K_M"."""
        return self.made.spec

    @property
    def label(self) -> str:
        """As in names of files: "FP8-dynamic", "Q4_K_M"."""
        return self.made.recipe.label

    @property
    def container(self) -> Container:
        """What its files are."""
        return self.made.recipe.container

    @property
    def files(self) -> tuple[ManifestFile, ...]:
        """All files with weights."""
        return self.made.files

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return self.made.nbytes

    @property
    def passed(self) -> bool:
        """Whether it may be published without being asked twice."""
        return self.measurement is not None and self.measurement.passed


@dataclass(frozen=True)
class VariantFolder:
    """A folder that convert wrote: a repository on the Hub."""

    path: Path
    container: Container
    model: str
    """The model's name in file names."""
    source: ManifestSource
    variants: tuple[PublishedVariant, ...]
    """Largest first."""
    report: Report | None
    """The one report that `measurement` of all variants is from."""
    report_folder: Path | None

    @cached_property
    def files(self) -> tuple[ManifestFile, ...]:
        """All files with weights, of all variants."""
        return tuple(file for variant in self.variants for file in variant.files)

    @cached_property
    def matrices(self) -> Mapping[str, Path]:
        """SHA-256 -> file: importance matrices that variants were made with, where they lie in the folder or beside it.

        They go to the Hub with the variants, for those who make others of them. Raises StreamquantError for a file that
        cannot be read.
        """
        found = {}
        for variant in self.variants:
            if (record := variant.made.imatrix) is None:
                continue
            name, sha256 = record.file, record.sha256
            if MATRIX.fullmatch(name) is None or any(file.path == name for file in self.files):
                continue
            for path in (self.path / name, real_path(self.path).parent / name):
                if sha256 not in found and path.is_file() and not path.is_symlink() and sha256_of(path) == sha256:
                    found[sha256] = path
        return found

    @property
    def not_passed(self) -> tuple[PublishedVariant, ...]:
        """Variants without a measurement, or with a gate that failed."""
        return tuple(variant for variant in self.variants if not variant.passed)


def read_folders(folder: Path, report: Path | None = None) -> tuple[VariantFolder, ...]:
    """Read a variant folder, or all variant folders in an --out folder, sorted by name.

    `report` is the folder of a report, or its report.json; by default `report` beside the variant folders, else inside
    each. Raises UsageError without a variant folder there, StreamquantError for a broken manifest or report.
    """
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder), required="a folder that convert wrote")
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    found = [folder] if (folder / MANIFEST).exists() else inside
    if not found:
        raise UsageError(
            "no variants here",
            where=str(folder),
            required=f"a folder with {MANIFEST}, or one that holds such folders",
            hint="give the --out folder of convert",
        )
    return tuple(read_folder(path, report) for path in found)


def read_folder(folder: Path, report: Path | None = None) -> VariantFolder:
    """Read one variant folder; see `read_folders`."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError("no variants here", where=str(folder), required=MANIFEST)
    plain = [PublishedVariant(variant) for variant in manifest.variants.values()]
    kinds = {variant.container for variant in plain}
    if len(kinds) != 1:
        where, names = str(folder / MANIFEST), sorted(kind.name for kind in kinds)
        raise StreamquantError("a folder of one kind of variant is published", where=where, found=names)
    found, place, why_not = _report_of(folder, report, plain)
    variants = [_measured(variant, found, manifest.source, why_not) for variant in plain]
    variants.sort(key=lambda variant: (-variant.nbytes, variant.spec))
    return VariantFolder(folder, kinds.pop(), manifest.model, manifest.source, tuple(variants), found, place)


# The report, tied to bytes


def _report_of(
    folder: Path, given: Path | None, variants: Sequence[PublishedVariant]
) -> tuple[Report | None, Path | None, str]:
    """The report for a folder with its place, and why a variant that is not in it has none."""
    if given is not None:
        place = given if given.is_dir() else given.parent
        return read_report(given), place, f"the report in {given.name or given} is not about it"
    reasons = ["there is no report"]
    for place in (real_path(folder).parent / REPORT_FOLDER, folder / REPORT_FOLDER):
        if not (place / REPORT).is_file():
            continue
        try:
            found = read_report(place)
        except StreamquantError as error:
            reasons.append(f"the report cannot be read: {error.what}")
            continue
        if any(_about(variant, found) is not None for variant in variants):
            return found, place, "the report is not about it"
        reasons.append("the report is about other variants")
        if any(_stale(variant, found) for variant in variants):
            reasons.append("the report is about other files of the same names")
    return None, None, reasons[-1]


def _measured(
    variant: PublishedVariant, report: Report | None, source: ManifestSource, why_not: str
) -> PublishedVariant:
    measurement = None
    if report is not None:
        about = _about(variant, report)
        if about is not None:
            gates = tuple(gate for gate in report.gate_results if gate.variant == about.label)
            measurement = Measurement(
                report, about, report.measured(about), gates, _is_source(report.original_files, source)
            )
        elif _stale(variant, report):
            why_not = "the report is about other files of the same names"
    return replace(variant, measurement=measurement, why_not=None if measurement is not None else why_not)


def _about(variant: PublishedVariant, report: Report) -> VariantReport | None:
    """What a report says of exactly the files of a variant.

    Sizes alone prove nothing, as every fine-tune of a model has the same: a file without a hash in the report is none
    of ours. One that could not be read may be known by some of its files only.
    """
    ours = {(PurePosixPath(file.path).name, file.size, file.sha256) for file in variant.files}
    for about in report.variants:
        theirs = {(file.name, file.size, file.sha256) for file in about.files}
        if theirs == ours or (theirs and theirs <= ours and report.measured(about) is None):
            return about
    return None


def _stale(variant: PublishedVariant, report: Report) -> bool:
    """Whether a report is about files of the same names, but not these; of shards, which all folders name alike, about
    those of a folder of this kind."""
    ours = {PurePosixPath(file.path).name for file in variant.files}
    return any(
        {file.name for file in about.files} == ours
        and (about.path.endswith(".gguf") or about.path.rstrip("/").lower().endswith(variant.label.lower()))
        for about in report.variants
    )


def _is_source(files: Sequence[MeasuredFile], source: ManifestSource) -> bool:
    sizes = {(file.name, file.size) for file in files}
    return sizes == {(PurePosixPath(file.path).name, file.size) for file in source.files}
