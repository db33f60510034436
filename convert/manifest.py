"""streamquant.json: what a folder of variants was made of, how, and what every byte of it should be.

One manifest a folder; a folder of GGUF files lists several variants. It holds no time and no path of the machine: the
same source, variants and versions give the same manifest. It is read with suspicion: its paths are opened and uploaded,
its texts printed.
"""

import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from streamquant.convert.options import ConversionOptions, parse_options
from streamquant.convert.plan.records import OutputTensor, Plan, VariantPlan
from streamquant.convert.recipes.block_runtimes import BlockRuntimes, parse_block_runtimes
from streamquant.convert.recipes.calibration import CalibrationRecord, parse_calibration
from streamquant.convert.recipes.imatrix import ImatrixRecord, parse_imatrix
from streamquant.convert.recipes.recipe import Recipe, parse_variants, recipe_of
from streamquant.convert.recipes.recipe_file import parse_recipe
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.stream import Written
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.quantized import QuantizedSource
from streamquant.files.json_record import JsonRecord
from streamquant.files.strict_json import read_record
from streamquant.files.writing import write_atomically
from streamquant.hub.repo import COMMIT
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS

MANIFEST = "streamquant.json"
MANIFEST_VERSION = 1
"""Raise it when a manifest says what earlier readers would take for something else."""
SHA256 = re.compile(r"[0-9a-f]{64}")
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""ORG/NAME, as the Hub takes it (huggingface_hub's validate_repo_id is stricter still)."""
_PACKAGES = ("streamquant", "compressed-tensors", "gguf", "llvmlite", "numba", "numpy", "tokenizers")
_BROKEN = "broken manifest"
_HINT = "it was edited or damaged: convert again into another folder, or put back a copy of it"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A file of the source or of a variant. The fields of this and the next records are the keys, in their order."""

    path: str
    """Relative to its folder, with slashes; never outside of it."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """What variants were made of."""

    name: str
    architecture: str
    """transformers' class."""
    parameters: int
    files: tuple[ManifestFile, ...]
    repo: str | None
    """ORG/NAME on the Hub; None for a local folder."""
    revision: str | None
    """The commit."""
    quantized: QuantizedSource | None = None
    """What its weights had lost before; None for plain floats."""

    def json(self) -> dict[str, Any]:
        """As in the file."""
        hub = {"repo": self.repo, "revision": self.revision}
        return {
            "name": self.name,
            **{key: value for key, value in hub.items() if value is not None},
            "architecture": self.architecture,
            "parameters": self.parameters,
            **({"quantized": asdict(self.quantized)} if self.quantized is not None else {}),
            "files": [asdict(file) for file in self.files],
        }


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """A part of a tensor: `size` bytes at `offset` of `file`."""

    name: str
    """In the file's header."""
    stored_as: str
    """The container's name of the type."""
    file: str
    offset: int
    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """A tensor of a variant that was made of one of the source, or of several: the experts of a layer, in order."""

    sources: tuple[str, ...]
    format: str
    reason: str
    parts: tuple[ManifestPart, ...]

    def json(self) -> dict[str, Any]:
        """As in the file: "source" for one, "sources" for several."""
        made_of = {"source": self.sources[0]} if len(self.sources) == 1 else {"sources": list(self.sources)}
        parts = [asdict(part) for part in self.parts]
        return {**made_of, "format": self.format, "reason": self.reason, "parts": parts}


@dataclass(frozen=True, slots=True)
class ManifestVariant:
    """A variant: how it was made, and its bytes."""

    spec: str
    """As on the command line: "fp8-dynamic", "gguf:Q4_K_M"."""
    recipe: Recipe
    description: str
    fingerprint: str
    options: ConversionOptions
    """But for the importance matrix, whose values are not in a manifest."""
    imatrix: ImatrixRecord | None
    calibration: CalibrationRecord | None
    versions: Mapping[str, str]
    """Package -> version."""
    bits_per_weight: float
    files: tuple[ManifestFile, ...]
    generated: tuple[str, ...]
    """Tensors without a source."""
    dropped: tuple[str, ...]
    """Source tensors that the variant does not hold."""
    tensors: tuple[ManifestTensor, ...]
    blocks: BlockRuntimes | None = None
    """Which programs run it, where its weights have a scale for each block; earlier manifests do not say."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files with weights."""
        return sum(file.size for file in self.files)

    @property
    def formats(self) -> Mapping[str, int]:
        """Format -> number of tensors, most first."""
        return dict(Counter(tensor.format for tensor in self.tensors).most_common())

    def json(self) -> dict[str, Any]:
        """As in the file."""
        imatrix = self.imatrix.json() if self.imatrix is not None else None
        calibration = {"calibration": self.calibration.json()} if self.calibration is not None else {}
        return {
            "description": self.description,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.file.record() if self.recipe.file is not None else None,
            "options": self.options.record() | {"imatrix": imatrix} | calibration,
            "versions": dict(self.versions),
            "bits_per_weight": self.bits_per_weight,
            **({"runtimes": self.blocks.json()} if self.blocks is not None else {}),
            "files": [asdict(file) for file in self.files],
            "generated": list(self.generated),
            "dropped": list(self.dropped),
            "tensors": [tensor.json() for tensor in self.tensors],
        }


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a folder."""

    model: str
    """The model's name in file names."""
    source: ManifestSource
    variants: Mapping[str, ManifestVariant]
    """By `ManifestVariant.spec`."""

    def json(self) -> dict[str, Any]:
        """As in the file; variants are sorted."""
        return {
            "manifest": MANIFEST_VERSION,
            "model": self.model,
            "source": self.source.json(),
            "variants": {spec: variant.json() for spec, variant in sorted(self.variants.items())},
        }

    def write(self, folder: Path) -> None:
        """Replace the manifest of a folder. Raises OSError."""
        text = json.dumps(self.json(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST, text.encode())

    def without(self, spec: str) -> "Manifest":
        """A manifest without one of the variants."""
        return replace(self, variants={name: variant for name, variant in self.variants.items() if name != spec})


# Reading


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None. Raises StreamquantError if it is not one, or broken."""
    found = _read(folder)
    if found is None:
        return None
    where = str(folder / MANIFEST)
    record = JsonRecord(found, where, _BROKEN, _HINT)
    model = record.text("model")
    source = _parse_source(record.object("source"))
    variants = {
        spec: _parse_variant(spec, JsonRecord(entry, f"{where}, variant {spec!r:.80}", _BROKEN, _HINT))
        for spec, entry in found["variants"].items()
    }
    return Manifest(model, source, variants)


def listed_files(folder: Path) -> Iterator[ManifestFile]:
    """The files of all variants in the manifest of a folder, as far as they can be read; none without a manifest."""
    try:
        found = _read(folder) or {"variants": {}}
        for entry in found["variants"].values():
            for file in JsonRecord(entry, "", _BROKEN).objects("files"):
                yield _parse_file(file)
    except StreamquantError:
        return


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    match manifest := read_record(path, _HINT):
        case {"manifest": int(version), "source": {"files": list()}, "variants": dict()} if (
            version == MANIFEST_VERSION and not isinstance(version, bool)
        ):
            return manifest
    raise StreamquantError(
        "not a manifest of this version of streamquant",
        where=str(path),
        found=f"manifest: {manifest.get('manifest')!r:.100}",
        required=f"manifest: {MANIFEST_VERSION}, with source and variants",
        hint="choose another folder, or move the file away",
    )


def _parse_source(record: JsonRecord) -> ManifestSource:
    repo, revision = record.optional_text("repo"), record.optional_text("revision")
    if repo is not None and not REPO.fullmatch(repo):
        raise record.broken("repo", repo, "ORG/NAME")
    if revision is not None and not COMMIT.fullmatch(revision):
        raise record.broken("revision", revision, "a commit: 40 hexadecimal digits")
    return ManifestSource(
        name=record.text("name"),
        architecture=record.text("architecture"),
        parameters=record.count("parameters"),
        files=_parse_files(record),
        repo=repo,
        revision=revision,
        quantized=None if record.take("quantized") is None else _parse_quantized(record.object("quantized")),
    )


def _parse_quantized(record: JsonRecord) -> QuantizedSource:
    return QuantizedSource(record.text("method"), record.texts("formats"), record.count("tensors"))


def _parse_variant(spec: str, record: JsonRecord) -> ManifestVariant:
    bits = record.take("bits_per_weight")
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < 1000:
        raise record.broken("bits_per_weight", bits, "a number")
    options = record.object("options")
    return ManifestVariant(
        spec=spec,
        recipe=_parse_recipe(spec, record),
        description=record.text("description"),
        fingerprint=record.text("fingerprint"),
        options=parse_options(options),
        imatrix=None if options.take("imatrix") is None else parse_imatrix(options.object("imatrix")),
        calibration=_parse_calibration(options),
        versions=record.text_map("versions"),
        bits_per_weight=float(bits),
        files=_parse_files(record),
        generated=record.texts("generated"),
        dropped=record.texts("dropped"),
        tensors=tuple(_parse_tensor(tensor) for tensor in record.objects("tensors")),
        blocks=None if record.take("runtimes") is None else parse_block_runtimes(record.object("runtimes")),
    )


def _parse_calibration(options: JsonRecord) -> CalibrationRecord | None:
    return None if options.take("calibration") is None else parse_calibration(options.object("calibration"))


def _parse_recipe(spec: str, record: JsonRecord) -> Recipe:
    """That of its recipe file, if it has one."""
    try:
        if (found := record.take("recipe")) is not None:
            return recipe_of(parse_recipe(found, f"{record.where}.recipe"))
        return parse_variants([spec])[0]
    except UsageError as error:
        raise StreamquantError(
            "broken manifest",
            where=error.where or record.where,
            found=f"{error.what}: {str(error.found)!r:.200}",
            required=error.required,
            hint=_HINT,
        ) from error


def _parse_files(record: JsonRecord) -> tuple[ManifestFile, ...]:
    files = tuple(_parse_file(file) for file in record.objects("files"))
    if not files:
        raise record.broken("files", [], "a list of files")
    if twice := [path for path, count in Counter(file.path for file in files).items() if count > 1]:
        raise record.broken("files", twice[0], "every file once")
    return files


def _parse_file(record: JsonRecord) -> ManifestFile:
    path, size, sha256 = record.text("path"), record.count("size"), record.text("sha256")
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts:
        raise record.broken("path", f"{path}, which leaves the folder", "a path inside the folder")
    if not parts or str(PurePosixPath(*parts)) != path or not path.isprintable() or "\\" in path:
        raise record.broken("path", path, "a path inside the folder")
    if not size:
        raise record.broken("size", size, "a number of bytes")
    if not SHA256.fullmatch(sha256):
        raise record.broken("sha256", sha256, "64 hexadecimal digits")
    return ManifestFile(path, size, sha256)


def _parse_tensor(record: JsonRecord) -> ManifestTensor:
    parts = tuple(
        ManifestPart(
            part.text("name"),
            part.text("stored_as"),
            part.text("file"),
            part.count("offset"),
            part.count("size"),
            part.text("xxh3_128"),
        )
        for part in record.objects("parts")
    )
    source = record.optional_text("source")
    sources = (source,) if source is not None else record.texts("sources")
    if not sources:
        raise record.broken("sources", [], "the names of source tensors")
    return ManifestTensor(sources, record.text("format"), record.text("reason"), parts)


# What a plan has to do with it


def complete_variants(out: Path, plan: Plan, delivery: Delivery | None = None) -> list[VariantPlan]:
    """The variants that an earlier run made exactly so, whose files are still there, by manifest and size, or were
    delivered. Raises StreamquantError for a broken manifest."""
    manifests = {folder: read_manifest(out / folder) for folder in {variant.folder for variant in plan.variants}}
    return [
        variant for variant in plan.variants if _is_complete(out, plan, variant, manifests[variant.folder], delivery)
    ]


def _is_complete(
    out: Path, plan: Plan, variant: VariantPlan, manifest: Manifest | None, delivery: Delivery | None
) -> bool:
    entry = manifest.variants.get(variant.recipe.spec) if manifest is not None else None
    if entry is None or entry.fingerprint != plan.variant_fingerprint(variant):
        return False
    listed = {file.path: file.sha256 for file in entry.files}
    for index in variant.files:
        file = plan.files[index]
        path = out / file.path
        if path.is_file() and path.stat().st_size == file.size:
            continue
        sha256 = listed.get(_within(variant, file.path))
        if path.exists() or delivery is None or sha256 is None or not delivery.has(file.path, file.size, sha256):
            return False
    return True


def is_of_same_source(folder: Path, plan: Plan) -> bool:
    """Whether what the folder's manifest lists, if it has one, was made of shards of the same names and sizes."""
    manifest = read_manifest(folder)
    if manifest is None:
        return True
    listed = {(file.path, file.size) for file in manifest.source.files}
    return listed == {(file.name, file.size) for file in plan.checkpoint.files}


def write_manifests(out: Path, plan: Plan, written: Written) -> None:
    """Write or extend the manifest of every folder of the plan, after all of its files have their final names."""
    source = _source(plan, written)
    for folder in sorted({variant.folder for variant in plan.variants}):
        before = read_manifest(out / folder)
        others = before.variants if before is not None and before.source == source else {}
        made = {v.recipe.spec: _variant(plan, v, written) for v in plan.variants if v.folder == folder}
        Manifest(plan.name, source, {**others, **made}).write(out / folder)


def _source(plan: Plan, written: Written) -> ManifestSource:
    hub = plan.checkpoint.hub if isinstance(plan.checkpoint, HubCheckpoint) else None
    return ManifestSource(
        name=plan.checkpoint.name,
        architecture=plan.model.hf_architecture,
        parameters=plan.checkpoint.parameter_count,
        files=tuple(ManifestFile(file.name, file.size, written.sources[file.name]) for file in plan.checkpoint.files),
        repo=hub.name if hub is not None else None,
        revision=hub.commit if hub is not None else None,
        quantized=plan.checkpoint.quantized,
    )


def _variant(plan: Plan, variant: VariantPlan, written: Written) -> ManifestVariant:
    files = [plan.files[index] for index in variant.files]
    options = plan.options_of(variant)
    return ManifestVariant(
        spec=variant.recipe.spec,
        recipe=variant.recipe,
        description=variant.recipe.description,
        fingerprint=plan.variant_fingerprint(variant),
        options=options,
        imatrix=options.imatrix.record() if options.imatrix is not None else None,
        calibration=options.calibration.record if options.calibration is not None else None,
        versions=versions(),
        bits_per_weight=round(plan.bits_per_weight(variant), 4),
        files=tuple(ManifestFile(_within(variant, file.path), file.size, written.files[file.path]) for file in files),
        generated=variant.generated,
        dropped=variant.dropped,
        tensors=tuple(_tensor(plan, variant, tensor, written) for tensor in variant.tensors),
        blocks=variant.blocks,
    )


def _tensor(plan: Plan, variant: VariantPlan, tensor: OutputTensor, written: Written) -> ManifestTensor:
    parts = []
    for number, (part, region) in enumerate(zip(FORMATS[tensor.format].parts, tensor.regions, strict=True)):
        path = plan.files[region.file].path
        parts.append(
            ManifestPart(
                name=tensor.name + part.suffix,
                stored_as=part.stored_as,
                file=_within(variant, path),
                offset=region.offset,
                size=region.nbytes,
                xxh3_128=written.tensors[path][f"{number}:{tensor.name}"],
            )
        )
    return ManifestTensor(tensor.sources, tensor.format, tensor.reason, tuple(parts))


def _within(variant: VariantPlan, path: str) -> str:
    return path.removeprefix(f"{variant.folder}/")


def versions() -> dict[str, str]:
    """Versions of what the bytes depend on. A package that is not installed (a source tree) is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
