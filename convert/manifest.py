"""streamquant.json: what a folder of variants was made of, how, and what every byte of it should be.

One manifest a folder; a folder of GGUF files lists several variants. It holds no time and no path of the machine: the
same source, variants and versions give the same manifest.
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from streamquant.convert.plan.records import OutputTensor, Plan, VariantPlan
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.stream import Written
from streamquant.files.strict_json import read_json_object
from streamquant.files.writing import write_atomically
from streamquant.quant.errors import StreamquantError
from streamquant.quant.formats import FORMATS

MANIFEST = "streamquant.json"
MANIFEST_VERSION = 1
_PACKAGES = ("streamquant", "compressed-tensors", "gguf", "llvmlite", "numba", "numpy", "tokenizers")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None. Raises StreamquantError if it is not one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json_object(path)
    if not _is_manifest(manifest):
        raise StreamquantError(
            "not a manifest of this version of streamquant",
            where=str(path),
            found=f"manifest: {manifest.get('manifest')!r:.100}",
            required=f"manifest: {MANIFEST_VERSION}, with source and variants",
            hint="choose another folder, or move the file away",
        )
    return manifest


def _is_manifest(manifest: dict[str, Any]) -> bool:
    match manifest:
        case {"manifest": int(version), "source": {"files": list(files)}, "variants": dict(variants)}:
            known = all(isinstance(file, dict) and {"path", "size", "sha256"} <= file.keys() for file in files)
            return version == MANIFEST_VERSION and known and all(isinstance(entry, dict) for entry in variants.values())
    return False


def is_complete(out: Path, plan: Plan, variant: VariantPlan, delivery: Delivery | None = None) -> bool:
    """Whether an earlier run made exactly this variant and its files are still there, by manifest and size, or were
    delivered."""
    manifest = read_manifest(out / variant.folder)
    entry = manifest["variants"].get(variant.recipe.spec) if manifest else None
    if not entry or entry.get("fingerprint") != plan.variant_fingerprint(variant):
        return False
    listed = {file["path"]: file["sha256"] for file in entry["files"]}
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
    listed = {(file["path"], file["size"]) for file in manifest["source"]["files"]}
    return listed == {(file.name, file.size) for file in plan.checkpoint.files}


def write_manifests(out: Path, plan: Plan, written: Written) -> None:
    """Write or extend the manifest of every folder of the plan, after all of its files have their final names."""
    for folder in sorted({variant.folder for variant in plan.variants}):
        manifest = read_manifest(out / folder)
        if manifest is None or manifest["source"] != _source(plan, written):
            manifest = {
                "manifest": MANIFEST_VERSION,
                "model": plan.name,
                "source": _source(plan, written),
                "variants": {},
            }
        for variant in plan.variants:
            if variant.folder == folder:
                manifest["variants"][variant.recipe.spec] = _variant(plan, variant, written)
        manifest["variants"] = dict(sorted(manifest["variants"].items()))
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        write_atomically(out / folder / MANIFEST, text.encode())


def _source(plan: Plan, written: Written) -> dict[str, Any]:
    hub = plan.checkpoint.hub
    return {
        "name": plan.checkpoint.name,
        **({"repo": hub.name, "revision": hub.commit} if hub is not None else {}),
        "architecture": plan.model.hf_architecture,
        "parameters": plan.checkpoint.parameter_count,
        "files": [
            {"path": file.name, "size": file.size, "sha256": written.sources[file.name]}
            for file in plan.checkpoint.files
        ],
    }


def _variant(plan: Plan, variant: VariantPlan, written: Written) -> dict[str, Any]:
    files = [plan.files[index] for index in variant.files]
    return {
        "description": variant.recipe.description,
        "fingerprint": plan.variant_fingerprint(variant),
        "recipe": variant.recipe.file.record() if variant.recipe.file is not None else None,
        "options": plan.options_of(variant).record(),
        "versions": versions(),
        "bits_per_weight": round(plan.bits_per_weight(variant), 4),
        "files": [
            {"path": _within(variant, file.path), "size": file.size, "sha256": written.files[file.path]}
            for file in files
        ],
        "generated": list(variant.generated),
        "dropped": list(variant.dropped),
        "tensors": [_tensor(plan, variant, tensor, written) for tensor in variant.tensors],
    }


def _tensor(plan: Plan, variant: VariantPlan, tensor: OutputTensor, written: Written) -> dict[str, Any]:
    parts = []
    for number, (part, region) in enumerate(zip(FORMATS[tensor.format].parts, tensor.regions, strict=True)):
        path = plan.files[region.file].path
        parts.append(
            {
                "name": tensor.name + part.suffix,
                "stored_as": part.stored_as,
                "file": _within(variant, path),
                "offset": region.offset,
                "size": region.nbytes,
                "xxh3_128": written.tensors[path][f"{number}:{tensor.name}"],
            }
        )
    return {"source": tensor.source, "format": tensor.format, "reason": tensor.reason, "parts": parts}


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
