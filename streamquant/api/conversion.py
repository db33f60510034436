"""`plan`, `convert`, and what decides about them: `formats`, `recipe`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamquant.api.models import Model, open_model
from streamquant.api.paths import paths_told
from streamquant.convert import conversion
from streamquant.convert.conversion import Conversion, check_disk, check_output_folder
from streamquant.convert.options import ConversionOptions, RunOptions, check_ignore, check_overrides
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes import catalogue
from streamquant.convert.recipes.catalogue import CatalogueFamily, CatalogueVariant
from streamquant.convert.recipes.recipe import Recipe, parse_variants
from streamquant.convert.recipes.recipe_extract import ExtractedRecipe, extract_recipe
from streamquant.convert.recipes.recipe_file import RecipeFile, read_recipe
from streamquant.convert.run.device import choose_device, with_notes
from streamquant.files.listener import SILENT, Listener

Variants = str | Sequence[str | Path | RecipeFile]
"""What to make: "fp8-dynamic", "gguf:Q8_0,Q4_K_M", the path of a recipe file, or the recipe that `recipe` returns."""


@dataclass(frozen=True, slots=True)
class Formats:
    """All that can be made, and of which models."""

    variants: tuple[CatalogueVariant, ...]
    families: tuple[CatalogueFamily, ...]


def formats() -> Formats:
    """Return the variants that can be made and the model families that can be converted."""
    return Formats(catalogue.variants(), catalogue.families())


@paths_told
def plan(
    model: Model,
    to: Variants,
    options: ConversionOptions | None = None,
    run: RunOptions | None = None,
    *,
    out: str | Path | None = None,
    delete_after_upload: bool = False,
    listener: Listener = SILENT,
) -> Plan:
    """Plan a conversion: every file, byte, format and reason. Reads no weight and writes nothing.

    For a model on the Hub it fetches a few MB: small files, and the headers of the shards.

    Args:
        model: folder of the checkpoint (config.json, safetensors in BF16, F16 or F32), or ORG/NAME[@REVISION].
        to: the variants to make, like ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"]; `formats` lists them.
        options: what decides the bytes that are written.
        run: how the conversion would run; it decides about notes on the device and the disk that is needed.
        out: also check that this folder could be written and that its disk is large enough.
        delete_after_upload: plan for `convert_and_push`, and check the limits of the Hub.
        listener: hears of waits for the Hub.

    Raises:
        UsageError: for variants, options or an output folder that cannot be.
        StreamquantError: for a model that cannot be read or converted, and for a disk that is too small.
    """
    run, out = run or RunOptions(), None if out is None else Path(out)
    device = choose_device(run.device)
    made = with_notes(plan_of(model, to, options, out, listener), device)
    if delete_after_upload:
        from streamquant.publish.upload.limits import check_plan

        made = replace(made, notes=(*made.notes, *check_plan(made)))
    if out is not None:
        check_output_folder(made, out)
        check_disk(made, out, disk_use(made, run, delete_after_upload=delete_after_upload))
    return made


def disk_use(plan: Plan, run: RunOptions | None = None, *, delete_after_upload: bool = False) -> Disk:
    """Return what a conversion by this plan takes on the disk at most. Raises UsageError for too small a spool."""
    if not delete_after_upload:
        return conversion.disk_of(plan, run or RunOptions())
    from streamquant.publish.upload.options import ROOM

    return conversion.disk_of(plan, run or RunOptions(), ROOM)


@paths_told
def convert(
    model: Model,
    to: Variants,
    out: str | Path,
    options: ConversionOptions | None = None,
    run: RunOptions | None = None,
    *,
    listener: Listener = SILENT,
) -> Conversion:
    """Convert a model: every variant from one read of the checkpoint, each in a folder of its own below `out`.

    A call that was interrupted goes on where it stopped when it is repeated. Shards of a model on the Hub are fetched
    while others are converted, and deleted when they are done.

    Args:
        model: folder of the checkpoint (config.json, safetensors in BF16, F16 or F32), or ORG/NAME[@REVISION].
        to: the variants to make, like ["fp8-dynamic", "gguf:Q8_0,Q4_K_M"]; `formats` lists them.
        out: the folder to write into; it is made if it is not there.
        options: what decides the bytes that are written.
        run: threads, device, disk for shards of the Hub. The bytes that are written are the same for all of them.
        listener: hears of the plan of what is left to do, and of the tasks "converting" and "fetching" in bytes.

    Raises:
        UsageError: for variants, options or an output folder that cannot be.
        StreamquantError: for a model that cannot be read or converted, and for a disk that is too small.
    """
    run, out = run or RunOptions(), Path(out)
    choose_device(run.device)  # refuses before the Hub is asked
    return conversion.convert(plan_of(model, to, options, out, listener), out, run, listener)


@paths_told
def recipe(path: str | Path, label: str | None = None) -> ExtractedRecipe:
    """Extract the recipe of a GGUF file of any publisher, for use as a variant. Reads the header only.

    Args:
        path: the file; of a split set, any of its files.
        label: name of the variant; by default its file type and "-like".

    Raises:
        StreamquantError: for a file that is broken, missing from its set, or no model.
    """
    return extract_recipe(Path(path), label)


def recipes_of(to: Variants) -> list[Recipe]:
    """The variants of a call. Raises UsageError for one that does not exist, and for a broken recipe file."""
    asked = [to] if isinstance(to, str) else to
    specs = [variant for variant in asked if isinstance(variant, str)]
    files = [read_recipe(v) if isinstance(v, Path) else v for v in asked if not isinstance(v, str)]
    return parse_variants(specs, files)


def plan_of(
    model: Model, to: Variants, options: ConversionOptions | None, out: Path | None, listener: Listener = SILENT
) -> Plan:
    """The plan of a conversion, without checks of the output. Raises what `plan` raises."""
    recipes = recipes_of(to)
    if options is not None:
        check_overrides(options.overrides, recipes)
        check_ignore(options.ignore, recipes)
    return make_plan(open_model(model, out, listener), recipes, options)
