"""`plan` and `convert`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import streamquant
from streamquant.cli.arguments import AsJson, Device, Jobs, Model, RecipeFiles, SpoolGib, Tensors, To
from streamquant.cli.console import print_line, print_result, say_view
from streamquant.cli.conversion_options import NOTHING, CommandLine, takes_conversion_options
from streamquant.cli.progress import console_listener
from streamquant.cli.publish import say_pushed
from streamquant.files.sizes import human_bytes

if TYPE_CHECKING:
    from streamquant.publish.upload.push import Pushed


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
        typer.Option(
            "--delete-after-upload",
            help="Show what `convert --push --delete-after-upload` needs, and check the Hub's limits.",
        ),
    ] = False,
    device: Device = "auto",
    jobs: Jobs = None,
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Print what a conversion would write: exact bytes, formats and reasons. No weight is read.

    For a model on the Hub it fetches a few MB: small files, and the headers of the shards.

    Examples:

    `streamquant plan Hermes-4-14B --to fp8-dynamic --to gguf:Q8_0,Q4_0`

    `streamquant plan NousResearch/Hermes-4-405B@main --to fp8-dynamic --to gguf:Q8_0,Q6_K,Q4_K_M`
    """
    from streamquant.convert.plan.view import plan_json, plan_view

    wanted, run = _wanted(to, recipe), _run_options(device, jobs, spool_gib)
    options = _conversion_options(given, wanted)
    with console_listener("run the same command again") as listener:
        plan = streamquant.plan(
            model, wanted, options, run, out=out, delete_after_upload=delete_after_upload, listener=listener
        )
    disk = streamquant.disk_use(plan, run, delete_after_upload=delete_after_upload)
    print_result(plan_json(plan, run.jobs, disk) if as_json else plan_view(plan, run.jobs, disk, tensors=tensors))


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
    """Make every variant from one read of the checkpoint. Run the same command again to continue after a stop.

    For a model on the Hub, shards are fetched while others are converted, and deleted when they are done.

    Examples:

    `streamquant convert Hermes-4-14B --to fp8-dynamic --out variants`

    `streamquant convert Hermes-4-14B --to fp8-dynamic --to gguf:BF16,Q8_0,Q4_0 --split-max-size 40G --out variants`

    `streamquant convert NousResearch/Hermes-4-405B@main --to gguf:Q4_K_M --spool-gib 60 --out variants`

    `streamquant convert NousResearch/Hermes-4-405B --to fp8-dynamic --out variants --push ORG/Hermes-4-405B --private
    --delete-after-upload`
    """
    wanted, run = _wanted(to, recipe), _run_options(device, jobs, spool_gib)
    options = _conversion_options(given, wanted)
    where = _early_push(push, private, without_report, push_revision, delete_after_upload)

    def show(plan: streamquant.Plan) -> None:
        from streamquant.convert.plan.view import plan_view
        from streamquant.convert.run.device import choose_device, with_notes

        disk = streamquant.disk_use(plan, run, delete_after_upload=delete_after_upload)
        say_view(plan_view(with_notes(plan, choose_device(run.device)), run.jobs, disk))

    with console_listener(on_plan=show) as listener:
        pushed: tuple[Pushed, ...] = ()
        if where is None:
            done = streamquant.convert(model, wanted, out, options, run, listener=listener)
        else:
            done, pushed = streamquant.convert_and_push(model, wanted, out, where, options, run=run, listener=listener)
    for variant in done.plan.variants:
        state = "was done already" if variant.recipe.spec in done.already_done else "done"
        size = human_bytes(done.plan.variant_bytes(variant))
        print_line(f"{variant.recipe.spec}: {state}, {size} in {out / variant.folder}")
    if done.resumed_chunks:
        print_line(f"resumed: {done.resumed_chunks} of {len(done.plan.chunks)} chunks were written before")
    say_pushed(pushed)


def _wanted(to: list[str] | None, recipes: list[Path] | None) -> list[str | Path | streamquant.RecipeFile]:
    return [*(to or ()), *(recipes or ())]


def _conversion_options(
    given: CommandLine, wanted: list[str | Path | streamquant.RecipeFile]
) -> streamquant.ConversionOptions:
    from streamquant.api.conversion import recipes_of
    from streamquant.convert.options import read_options

    return read_options(given, recipes_of(wanted))


def _run_options(device: str, jobs: int | None, spool_gib: float | None) -> streamquant.RunOptions:
    run = streamquant.RunOptions(device=device, spool_gib=spool_gib)
    return run if jobs is None else replace(run, jobs=jobs)


def _early_push(
    repo: str | None, private: bool, without_report: bool, revision: str | None, delete: bool
) -> streamquant.EarlyPush | None:
    """What --push and its options ask for."""
    if repo is None and not (private or without_report or revision or delete):
        return None
    from streamquant.publish.upload.options import early_push

    options = streamquant.PushOptions(private, revision, without_report=without_report)
    return early_push(repo, options, delete=delete)
