"""A plan for people (rich tables) and for programs (JSON)."""

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamquant.convert.metadata.embedding import CLASSIFIER
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.records import OutputTensor, Plan, VariantPlan
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.files.sizes import human_bytes
from streamquant.quant.formats import FORMATS


def plan_json(plan: Plan, jobs: int, disk: Disk | None = None) -> dict[str, Any]:
    """The whole plan as JSON: every file with its size, every tensor with its format, reason and address."""
    hub = plan.checkpoint.hub if isinstance(plan.checkpoint, HubCheckpoint) else None
    disk = disk or Disk(plan.nbytes)
    return {
        "model": plan.name,
        "architecture": plan.model.hf_architecture,
        "source": {
            "files": [{"path": file.name, "size": file.size} for file in plan.checkpoint.files],
            "parameters": plan.checkpoint.parameter_count,
            "bytes": plan.checkpoint.nbytes,
            **({"quantized": asdict(quantized)} if (quantized := plan.checkpoint.quantized) is not None else {}),
            **({"repo": hub.name, "revision": hub.revision, "commit": hub.commit} if hub is not None else {}),
        },
        "disk_bytes": disk.peak,
        "spool_bytes": disk.spool,
        "memory_bytes": plan.memory_bytes(jobs),
        "jobs": jobs,
        "chunks": len(plan.chunks),
        "fingerprint": plan.fingerprint,
        "notes": list(plan.notes),
        "variants": [_variant_json(plan, variant) for variant in plan.variants],
    }


def _variant_json(plan: Plan, variant: VariantPlan) -> dict[str, Any]:
    return {
        "variant": variant.recipe.spec,
        "description": variant.recipe.description,
        "bytes": plan.variant_bytes(variant),
        "bits_per_weight": plan.bits_per_weight(variant),
        **({"runtimes": variant.blocks.json()} if variant.blocks is not None else {}),
        "files": [
            {
                "path": plan.files[index].path,
                "size": plan.files[index].size,
                "header_bytes": len(plan.files[index].literals[0][1]),
            }
            for index in variant.files
        ],
        "generated": list(variant.generated),
        "dropped": list(variant.dropped),
        "tensors": [_tensor_json(plan, tensor) for tensor in variant.tensors],
    }


def _tensor_json(plan: Plan, tensor: OutputTensor) -> dict[str, Any]:
    return {
        **source_json(tensor.sources),
        "format": tensor.format,
        "reason": tensor.reason,
        "parts": [
            {
                "name": tensor.name + part.suffix,
                "stored_as": part.stored_as,
                "file": plan.files[region.file].path,
                "offset": region.offset,
                "size": region.nbytes,
            }
            for part, region in zip(FORMATS[tensor.format].parts, tensor.regions, strict=True)
        ],
    }


def source_json(sources: tuple[str, ...]) -> dict[str, Any]:
    """The source tensor of a stored one as JSON, or its sources where it has several."""
    return {"source": sources[0]} if len(sources) == 1 else {"sources": list(sources)}


def plan_view(plan: Plan, jobs: int, disk: Disk | None = None, *, tensors: bool = False) -> RenderableType:
    """What a user reads before a conversion: files and sizes, formats and reasons, notes, disk and memory."""
    source = plan.checkpoint
    title = Text.assemble(
        (plan.name, "bold"),
        f"  {plan.model.hf_architecture}, {source.parameter_count:,} weights, {human_bytes(source.nbytes)}"
        f" in {len(source.files)} file{'s' if len(source.files) > 1 else ''}",
    )
    if isinstance(source, HubCheckpoint):
        title.append(f"\n{source.hub.name}, revision {source.hub.revision}, commit {source.hub.commit}")
    parts: list[RenderableType] = [title, _variants_table(plan), _formats_table(plan)]
    if tensors:
        parts += [_tensors_table(variant) for variant in plan.variants]
    refused = {v.blocks.note(v.recipe.spec) for v in plan.variants if v.blocks is not None and v.blocks.is_refused}
    parts += [Text(f"{'warning' if note in refused else 'note'}: {note}") for note in plan.notes]
    memory = human_bytes(plan.memory_bytes(jobs))
    disk = disk or Disk(plan.nbytes)
    parts.append(Text(f"disk needed: {disk}; memory: about {memory} with {jobs} jobs"))
    return Group(*parts)


def _variants_table(plan: Plan) -> Table:
    table = Table("variant", "file", box=None, header_style="bold", pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("bits/weight", justify="right")
    for variant in plan.variants:
        names = [plan.files[index].path for index in variant.files]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {len(names)} files"
        size = human_bytes(plan.variant_bytes(variant))
        table.add_row(variant.recipe.spec, shown, size, f"{plan.bits_per_weight(variant):.2f}")
    return table


def _formats_table(plan: Plan) -> Table:
    """Tensors by format and reason: a line for every rule that applied, fallbacks included."""
    table = Table("variant", "format", box=None, header_style="bold", pad_edge=False)
    table.add_column("tensors", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why")
    for variant in plan.variants:
        groups: dict[tuple[str, str], list[OutputTensor]] = {}
        for tensor in variant.tensors:
            groups.setdefault((tensor.format, tensor.reason), []).append(tensor)
        for (name, reason), members in sorted(groups.items(), key=lambda item: -sum(t.nbytes for t in item[1])):
            size = human_bytes(sum(tensor.nbytes for tensor in members))
            table.add_row(variant.recipe.spec, name, str(len(members)), size, reason)
        if variant.generated_at:
            size = human_bytes(sum(region.nbytes for region in variant.generated_at.values()))
            table.add_row(variant.recipe.spec, "scales", str(len(variant.generated_at)), size, "of the calibration")
        for name in set(variant.generated) - variant.generated_at.keys():
            made = "rows of the head, for a reranker" if name == CLASSIFIER else "made from config.json"
            table.add_row(variant.recipe.spec, "" if name == CLASSIFIER else "F32", "1", "", f"{name}: {made}")
        if variant.dropped:
            table.add_row(variant.recipe.spec, "-", str(len(variant.dropped)), "", "known, not part of a GGUF")
    return table


def _tensors_table(variant: VariantPlan) -> Table:
    table = Table("tensor", "format", title=variant.recipe.spec, box=None, header_style="bold", pad_edge=False)
    table.add_column("bytes", justify="right")
    table.add_column("offset", justify="right")
    table.add_column("why")
    for tensor in variant.tensors:
        offset = tensor.regions[0].offset
        table.add_row(tensor.name, tensor.format, f"{tensor.nbytes:,}", f"{offset:,}", tensor.reason)
    return table
