"""From headers and recipes to addresses: every byte of every output has its place before the first weight is read.

    Checkpoint + recipes -> Plan: files (exact size, header bytes), tensors (format, reason, address), chunks

How a container stores its tensors is told by its layout: layout_gguf.py, layout_safetensors.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from streamquant.convert.architectures import ModelDescription, describe
from streamquant.convert.metadata.front_matter import front_matter_notes
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.importance import PlannedImportance
from streamquant.convert.plan.layout import Draft, Layout, as_matrix
from streamquant.convert.plan.layout_gguf import GgufLayout
from streamquant.convert.plan.layout_safetensors import SafetensorsLayout
from streamquant.convert.plan.records import Matrix, Placement, Plan, VariantPlan
from streamquant.convert.recipes.container import GGUF, SAFETENSORS, Container
from streamquant.convert.recipes.mix import UNQUANTIZED
from streamquant.convert.recipes.overrides import Overrides
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.side_files import check_own
from streamquant.convert.source.tensor import SourceTensor
from streamquant.convert.source.weights import CONFIG
from streamquant.files.machine import collector_paused
from streamquant.files.sizes import human_bytes
from streamquant.quant.errors import UsageError
from streamquant.quant.formats import FORMATS

LAYOUTS: Mapping[Container, type[Layout]] = {GGUF: GgufLayout, SAFETENSORS: SafetensorsLayout}
"""How each container stores tensors."""


@collector_paused()
def make_plan(checkpoint: Checkpoint, recipes: Sequence[Recipe], options: ConversionOptions | None = None) -> Plan:
    """Lay out every variant. Reads config.json and the tokenizer, no weight.

    Raises StreamquantError for a model that cannot be converted, UsageError for options that cannot work.
    """
    options = options or ConversionOptions()
    if options.name is not None and (not options.name or options.name.startswith(".") or "/" in options.name):
        raise UsageError("name not allowed", found=repr(options.name), required="a plain file name")
    check_own(checkpoint.folder, (CONFIG, *checkpoint.side_files))
    model = describe(checkpoint.config)
    model.match({name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    draft = Draft(checkpoint, model, options, PlannedImportance(options.imatrix, model))
    layouts = {container: LAYOUTS[container](draft) for container in {recipe.container for recipe in recipes}}
    variants = tuple(layouts[recipe.container].lay_out(recipe) for recipe in recipes)
    mixed = [recipe for recipe in recipes if recipe.container.takes_importance]
    biases = [
        f"no layer has {name}, which config.json switches on: it is zero, as in transformers and llama.cpp"
        for name in model.absent_biases(checkpoint.tensors)
    ]
    notes = [*checkpoint.notes, *model.notes, *biases, *draft.notes, *_overrides_notes(mixed, options.overrides, model)]
    notes += draft.importance.notes(is_asked=bool(mixed))
    if options.calibration is not None:
        is_used = any(recipe.needs_calibration for recipe in recipes)
        notes += options.calibration.notes() if is_used else ["the calibration has no use: no variant needs it"]
    notes += front_matter_notes(checkpoint.folder)
    left_out = [name for name in checkpoint.tensors if model.is_left_out(name)]
    if left_out:
        notes.append(
            f"{len(left_out)} tensors are of what the model has beside its text model ({left_out[0]!r} and so on):"
            " GGUF files leave them out, FP8 folders keep them as they are"
        )
    if checkpoint.ignored_files:
        notes.append(f"not part of the checkpoint, left alone: {', '.join(checkpoint.ignored_files)}")
    matrices = tuple(_matrices([*checkpoint.tensors.values(), *draft.wholes.values()], variants))
    plan = Plan(checkpoint, model, options, tuple(draft.files), variants, matrices, tuple(notes))
    return replace(plan, notes=(*notes, *_visit_notes(plan)))


def _visit_notes(plan: Plan) -> Iterator[str]:
    """Which variants need the largest magnitudes of weights before they are made, and what that costs."""
    specs = ", ".join(v.recipe.spec for v in plan.variants if any(tensor.amax_of for tensor in v.tensors))
    if not specs:
        return
    source = plan.checkpoint.tensors
    sets = {output.amax_of for matrix in plan.matrices for output in matrix.outputs if output.amax_of}
    largest = max(sum(source[name].nbytes for name in names) for names in sets)
    yield (
        f"{specs}: the largest weight of each linear layer, or of those that runtimes merge, is found before they are"
        f" encoded: {human_bytes(plan.visited_bytes)} are read once more, from memory where {human_bytes(largest)} of"
        " it are free for files"
    )
    scattered = [names for names in sets if len({file for name in names for file in source[name].files}) > 1]
    if scattered and isinstance(plan.checkpoint, HubCheckpoint):
        yield (
            f"{specs}: {len(scattered)} of these sets of layers lie in several shards, which are in the spool together"
        )


def _overrides_notes(recipes: Sequence[Recipe], overrides: Overrides, model: ModelDescription) -> list[str]:
    """Which overrides have no effect."""
    names = [rule.gguf_name for rule in model.stored_rules()]
    notes = []
    if overrides:
        notes += [f"--tensor-type {pattern}: in the name of no tensor" for pattern in overrides.unmatched(names)]
        ignoring = [recipe.spec for recipe in recipes if recipe.takes_overrides and recipe.base in UNQUANTIZED]
        if ignoring and (overrides.tensor_types or overrides.pure):
            notes.append(f"{', '.join(ignoring)}: --tensor-type and --pure are for quantized file types only")
    for recipe in recipes:
        if recipe.file is not None:
            missing = recipe.file.overrides.unmatched(names)
            notes += [f"{recipe.spec}: {text}: in the name of no tensor" for text in missing]
    return notes


def _matrices(tensors: Sequence[SourceTensor], variants: Sequence[VariantPlan]) -> Iterator[Matrix]:
    uses: dict[str, list[Placement]] = {}
    for variant in variants:
        for stored in variant.tensors:
            for output in stored.placements():
                uses.setdefault(output.source, []).append(output)
    for tensor in tensors:
        outputs = tuple(uses.get(tensor.name, ()))
        if outputs:
            view = next((output.view for output in outputs if output.view is not None), None)
            rows, n = as_matrix(tensor, view)
            matrix = Matrix(tensor, rows, n, 1, outputs)
            steps = {FORMATS[output.format].rows_per_group for output in outputs}
            steps |= {matrix.resolved(output).row_step for output in outputs}
            steps |= {rows // matrix.resolved(o).matrices for o in outputs if matrix.encodes_by_matrix(o)}
            yield Matrix(tensor, rows, n, math.lcm(*steps), outputs)
