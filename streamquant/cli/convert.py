"""`plan` and `convert`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamquant.convert.conversion import check_disk, check_output_folder, convert, disk_of
from streamquant.convert.options import RunOptions, read_options
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.plan.view import plan_json, plan_view
from streamquant.convert.recipes.recipe import Recipe, parse_variants
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.convert.run.device import choose_device, with_notes
from streamquant.convert.source.open import open_source
from streamquant.files.machine import usable_cores
from streamquant.files.sizes import human_bytes

if TYPE_CHECKING:
    from streamquant.publish.upload.options import EarlyPush
    from streamquant.publish.upload.push import Pushed
from streamquant.cli.arguments import (
    AsJson,
    Device,
    Jobs,
    Model,
    RecipeFiles,
    SpoolGib,
    Tensors,
    To,
)
from streamquant.cli.console import error_console, out_console, print_result
from streamquant.cli.conversion_options import NOTHING, CommandLine, takes_conversion_options
from streamquant.cli.progress import console_listener
from streamquant.cli.publish import say_pushed


@takes_conversion_options
def plan_command(
    model: Model,
    to: To = None,
    out: Annotated[
        Path | None, typer.Option(help="Also check that this folder could be written and its disk is large enough.")
    ] = None,
    recipe: RecipeFiles = None,
    given: CommandLine = NOTHING,
    spool_gib: SpoolGib = None,
    delete_after_upload: Annotated[
        bool,
        typer.Option("--delete-after-upload", help="As of convert --push: what it needs then, and the Hub's limits."),
    ] = False,
    device: Device = "auto",
    jobs: Jobs = None,
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Print what a conversion would write: exact bytes, formats and reasons. No weight is read.

    Of a model on the Hub a few MB are fetched: small files, and the headers of the shards.

    Examples:

    `streamquant plan Hermes-4-14B --to fp8-dynamic --to gguf:Q8_0,Q4_0`

    `streamquant plan NousResearch/Hermes-4-405B@main --to fp8-dynamic --to gguf:Q8_0,Q6_K,Q4_K_M`
    """
    recipes = _recipes(to, recipe)
    options = read_options(given, recipes)
    checkpoint = open_source(model, out=out)
    plan = with_notes(make_plan(checkpoint, recipes, options), choose_device(device))
    if delete_after_upload:
        from streamquant.publish.upload.limits import check_plan

        plan = replace(plan, notes=(*plan.notes, *check_plan(plan)))
    how = RunOptions(jobs or usable_cores(), device, spool_gib)
    disk = _disk(plan, how, delete_after_upload)
    if out is not None:
        check_output_folder(checkpoint, out, [variant.folder for variant in plan.variants])
        check_disk(plan, out, disk)
    print_result(plan_json(plan, how.jobs, disk) if as_json else plan_view(plan, how.jobs, disk, tensors=tensors))


@takes_conversion_options
def convert_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the variants; each gets a folder of its own in it.")],
    to: To = None,
    recipe: RecipeFiles = None,
    given: CommandLine = NOTHING,
    spool_gib: SpoolGib = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Upload each file as soon as it is finished, to ORG/NAME-GGUF and so on. Needs --private or "
            "--without-report: there is no report yet.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: to private repositories.")] = False,
    without_report: Annotated[
        bool, typer.Option("--without-report", help="With --push: publish what nobody has measured; the card says so.")
    ] = False,
    push_revision: Annotated[str | None, typer.Option(help="With --push: the branch. Default: main.")] = None,
    delete_after_upload: Annotated[
        bool, typer.Option("--delete-after-upload", help="With --push: delete each file when the Hub holds it.")
    ] = False,
    device: Device = "auto",
    jobs: Jobs = None,
) -> None:
    """Make every variant from one read of the checkpoint. Stopped? The same command goes on where it was.

    Shards of a model on the Hub are fetched while others are converted, and deleted when they are done.

    Examples:

    `streamquant convert Hermes-4-14B --to fp8-dynamic --out variants`

    `streamquant convert Hermes-4-14B --to fp8-dynamic --to gguf:BF16,Q8_0,Q4_0 --split-max-size 40G --out variants`

    `streamquant convert NousResearch/Hermes-4-405B@main --to gguf:Q4_K_M --spool-gib 60 --out variants`

    `streamquant convert NousResearch/Hermes-4-405B --to fp8-dynamic --out variants --push ORG/Hermes-4-405B --private
    --delete-after-upload`
    """
    recipes = _recipes(to, recipe)
    options = read_options(given, recipes)
    where = _early_push(push, private, without_report, push_revision, delete_after_upload)
    how = RunOptions(jobs or usable_cores(), choose_device(device), spool_gib)

    def show(plan: object) -> None:
        if isinstance(plan, Plan) and error_console.is_terminal:
            disk = _disk(plan, how, delete_after_upload)
            error_console.print(plan_view(with_notes(plan, how.device), how.jobs, disk))

    checkpoint = open_source(model, out=out)
    with console_listener(on_plan=show) as listener:
        plan = make_plan(checkpoint, recipes, options)
        pushed: Sequence[Pushed] = ()
        if where is None:
            done = convert(plan, out, how, listener)
        else:
            from streamquant.publish.upload.streaming import convert_and_push

            done, pushed = convert_and_push(plan, out, where, how, listener)
    for variant in done.plan.variants:
        state = "was done already" if variant.recipe.spec in done.already_done else "done"
        size = human_bytes(done.plan.variant_bytes(variant))
        out_console.print(f"{variant.recipe.spec}: {state}, {size} in {out / variant.folder}", highlight=False)
    if done.resumed_chunks:
        out_console.print(f"resumed: {done.resumed_chunks} of {len(done.plan.chunks)} chunks were written before")
    say_pushed(pushed)


def _recipes(to: list[str] | None, files: list[Path] | None) -> list[Recipe]:
    return parse_variants(to or [], [read_recipe(file) for file in files or []])


def _early_push(
    repo: str | None, private: bool, without_report: bool, revision: str | None, delete: bool
) -> "EarlyPush | None":
    """What --push and its options ask for."""
    if repo is None and not (private or without_report or revision or delete):
        return None
    from streamquant.publish.upload.options import PushOptions, early_push

    return early_push(repo, PushOptions(private, revision, without_report=without_report), delete=delete)


def _disk(plan: Plan, how: RunOptions, delete_after_upload: bool) -> Disk:
    if not delete_after_upload:
        return disk_of(plan, how)
    from streamquant.publish.upload.options import ROOM

    return disk_of(plan, how, ROOM)
