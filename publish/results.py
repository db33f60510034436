"""What lies in a variant folder: the manifest, and what a report says of exactly these bytes.

Model cards and uploads read the same records. A report counts for a variant if it names files of the same names, sizes
and hashes as the manifest; a report of earlier bytes, or of bytes that nobody can name, counts for nothing.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from streamquant.convert.manifest import MANIFEST, read_manifest
from streamquant.convert.recipes.container import Container, container_of
from streamquant.files.hashing import sha256_of
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.gates import GateResult
from streamquant.validate.logits.comparison import VariantResult
from streamquant.validate.readback.measured_files import SHA256, MeasuredFile
from streamquant.validate.report.data import REPORT, Report, VariantReport, read_report

REPORT_FOLDER = "report"
"""Where a report is looked for, below the --out folder and below a variant folder; and its name in a repository."""
CARD = "README.md"
COMMIT = re.compile(r"[0-9a-f]{40}")
MATRIX = re.compile(r"\w[\w.+ -]{0,200}\.(gguf|dat)", re.ASCII)
"""Names of importance matrices."""
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""ORG/NAME, as the Hub takes it (huggingface_hub's validate_repo_id is stricter still)."""


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of a manifest."""

    path: str
    """Relative to the variant folder, with slashes; never outside of it."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """What variants were made of."""

    name: str
    architecture: str
    """transformers' class."""
    parameters: int
    files: tuple[PublishedFile, ...]
    repo: str | None
    """ORG/NAME on the Hub; None for a local folder."""
    revision: str | None
    """The commit."""


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
    """A variant of a manifest. Records that depend on the kind of variant are as in the manifest."""

    spec: str
    """As on the command line: "fp8-dynamic", "gguf:Q4_K_M"."""
    label: str
    """As in names of files: "FP8-dynamic", "Q4_K_M"."""
    description: str
    files: tuple[PublishedFile, ...]
    bits_per_weight: float
    recipe: Mapping[str, Any] | None
    """The recipe file, where there was one."""
    options: Mapping[str, Any]
    imatrix: Mapping[str, Any] | None
    """file, sha256, datasets, entries, chunks, include_weights, exclude_weights"""
    versions: Mapping[str, str]
    formats: Mapping[str, int]
    """Format -> number of tensors, most first."""
    measurement: Measurement | None
    why_not: str | None
    """A sentence, without a full stop, where there is no measurement."""

    @property
    def container(self) -> Container:
        """What its files are."""
        return container_of(self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of all files with weights."""
        return sum(file.size for file in self.files)

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
    source: Source
    variants: tuple[PublishedVariant, ...]
    """Largest first."""
    report: Report | None
    """The one report that `measurement` of all variants is from."""
    report_folder: Path | None

    @cached_property
    def files(self) -> tuple[PublishedFile, ...]:
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
            name, sha256 = (str((variant.imatrix or {}).get(key)) for key in ("file", "sha256"))
            if MATRIX.fullmatch(name) is None or any(file.path == name for file in self.files):
                continue
            for path in (self.path / name, self.path.resolve().parent / name):
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
    where = str(folder / MANIFEST)
    source = _source(manifest["source"], where)
    plain = [_variant(spec, entry, where) for spec, entry in manifest["variants"].items()]
    kinds = {variant.container for variant in plain}
    if len(kinds) != 1:
        found_kinds = sorted(kind.name for kind in kinds)
        raise StreamquantError("a folder of one kind of variant is published", where=where, found=found_kinds)
    model = _text(manifest.get("model"), f"{where}, model")
    found, place, why_not = _report_of(folder, report, plain)
    variants = [_measured(variant, found, source, why_not) for variant in plain]
    variants.sort(key=lambda variant: (-variant.nbytes, variant.spec))
    return VariantFolder(folder, kinds.pop(), model, source, tuple(variants), found, place)


# The manifest, read with suspicion: its paths are uploaded, and its texts are printed


def _source(record: Mapping[str, Any], where: str) -> Source:
    where = f"{where}, source"
    repo, revision = record.get("repo"), record.get("revision")
    if repo is not None and (not isinstance(repo, str) or not REPO.fullmatch(repo)):
        raise _broken(f"{where}.repo", repo, "ORG/NAME")
    if revision is not None and (not isinstance(revision, str) or not COMMIT.fullmatch(revision)):
        raise _broken(f"{where}.revision", revision, "a commit: 40 hexadecimal digits")
    return Source(
        name=_text(record.get("name"), f"{where}.name"),
        architecture=_text(record.get("architecture"), f"{where}.architecture"),
        parameters=_count(record.get("parameters"), f"{where}.parameters"),
        files=_files(record["files"], f"{where}.files"),
        repo=repo,
        revision=revision,
    )


def _variant(spec: str, entry: Mapping[str, Any], where: str) -> PublishedVariant:
    where = f"{where}, variant {spec!r:.80}"
    bits = entry.get("bits_per_weight")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < 1000:
        raise _broken(f"{where}.bits_per_weight", bits, "a number")
    options = _object(entry.get("options"), f"{where}.options")
    imatrix, recipe = options.get("imatrix"), entry.get("recipe")
    versions = _object(entry.get("versions"), f"{where}.versions")
    return PublishedVariant(
        spec=_text(spec, where),
        label=container_of(spec).label(spec),
        description=_text(entry.get("description"), f"{where}.description"),
        files=_files(entry.get("files"), f"{where}.files"),
        bits_per_weight=float(bits),
        recipe=None if recipe is None else _object(recipe, f"{where}.recipe"),
        options=options,
        imatrix=None if imatrix is None else _object(imatrix, f"{where}.options.imatrix"),
        versions={name: _text(text, f"{where}.versions") for name, text in versions.items()},
        formats=_formats(entry.get("tensors"), f"{where}.tensors"),
        measurement=None,
        why_not=None,
    )


def _files(record: object, where: str) -> tuple[PublishedFile, ...]:
    if not isinstance(record, list) or not record:
        raise _broken(where, record, "a list of files")
    files = tuple(_file(item, where) for item in record)
    if twice := [path for path, count in Counter(file.path for file in files).items() if count > 1]:
        raise _broken(where, twice[0], "every file once")
    return files


def _file(record: object, where: str) -> PublishedFile:
    match record:
        case {"path": str(path), "size": int(size), "sha256": str(sha256)} if size > 0 and SHA256.fullmatch(sha256):
            parts = PurePosixPath(path).parts
            plain = str(PurePosixPath(*parts)) == path and not path.startswith("/") and ".." not in parts
            if plain and path.isprintable() and "\\" not in path and parts:
                return PublishedFile(path, size, sha256)
            raise _broken(where, path, "a path inside the folder")
    raise _broken(where, record, "path, size and sha256 of a file")


def _formats(record: object, where: str) -> dict[str, int]:
    if not isinstance(record, list) or not all(isinstance(tensor, dict) for tensor in record):
        raise _broken(where, record, "a list of tensors")
    return dict(Counter(_text(tensor.get("format"), where) for tensor in record).most_common())


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _broken(where, value, "an object")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _broken(where, value, "a text")
    return value


def _count(value: object, where: str) -> int:
    if type(value) is not int or value < 0:
        raise _broken(where, value, "a whole number")
    return value


def _broken(where: str, found: object, required: str) -> StreamquantError:
    return StreamquantError("broken manifest", where=where, found=f"{found!r:.200}", required=required)


# The report, tied to bytes


def _report_of(
    folder: Path, given: Path | None, variants: Sequence[PublishedVariant]
) -> tuple[Report | None, Path | None, str]:
    """The report for a folder with its place, and why a variant that is not in it has none."""
    if given is not None:
        place = given if given.is_dir() else given.parent
        return read_report(given), place, f"the report in {given.name or given} is not about it"
    reasons = ["there is no report"]
    for place in (folder.resolve().parent / REPORT_FOLDER, folder / REPORT_FOLDER):
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


def _measured(variant: PublishedVariant, report: Report | None, source: Source, why_not: str) -> PublishedVariant:
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


def _is_source(files: Sequence[MeasuredFile], source: Source) -> bool:
    sizes = {(file.name, file.size) for file in files}
    return sizes == {(PurePosixPath(file.path).name, file.size) for file in source.files}
