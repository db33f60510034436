"""`push`, `card` and `run`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import streamquant

if TYPE_CHECKING:
    from streamquant.publish.upload.push import Pushed
from streamquant.cli.console import print_line, print_result, say_note
from streamquant.cli.progress import console_listener


def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A variant folder, or the --out folder with several.")],
    repo: Annotated[
        str, typer.Option(help="ORG/NAME; for an --out folder, the stem to which -GGUF and so on is added.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; refuse a public one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created if needed. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Upload into a pull request.")] = False,
    without_report: Annotated[
        bool,
        typer.Option("--without-report", help="Also publish what was not measured or failed a gate; the card says so."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report beside or in DIR.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded where; change nothing.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
) -> None:
    """Publish variants on the Hugging Face Hub with their cards and reports. Files that are there are not sent again.

    The exit code is 3 if a variant was not measured or failed a gate. Example:
    `streamquant push variants --repo ORG/Hermes-4-14B`
    """
    from streamquant.publish.upload.push_report import push_view

    options = streamquant.PushOptions(
        private, revision, create_pr, without_report, message=commit_message, report=report, dry_run=dry_run
    )
    with console_listener() as listener:
        pushed = streamquant.push(folder, repo, options, listener=listener)
    if dry_run:
        print_result(push_view(pushed), is_kept=True)
        return
    say_pushed(pushed)


def card_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A variant folder, or the --out folder with several.")],
    report: Annotated[Path | None, typer.Option(help="Folder of the report. Default: report beside or in DIR.")] = None,
    repo: Annotated[
        str | None,
        typer.Option(help="ORG/NAME for the commands in the card; for an --out folder the stem, as for push."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="ORG/NAME of the original, if it came from a local folder.")
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="Who made the variants. Default: the ORG of --repo.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder of the original, for its licence, sampling defaults and chat template.")
    ] = None,
    no_prompts: Annotated[bool, typer.Option("--no-prompts", help="Do not render the chat template.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that was written by hand.")] = False,
) -> None:
    """Write the model card, README.md, of every variant, from its manifest and the report of exactly its files.

    Example: `streamquant card variants --report report --repo ORG/Hermes-4-14B --base-model NousResearch/Hermes-4-14B`
    """
    options = streamquant.CardOptions(base_model, repo, quantized_by, source, not no_prompts, force)
    for path in streamquant.card(folder, options, report=report):
        print_line(path)


def run_command(
    release: Annotated[
        Path, typer.Argument(metavar="RELEASE.yaml", help="The release: source, variants, texts, gates, repository.")
    ],
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and those after it, even if they are done."),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run only this stage, even if it is done.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and what each would do; change nothing.")
    ] = False,
) -> None:
    """Run a release from one file: importance matrix, variants, validation, cards, push. Skips finished stages.

    Stages: plan, imatrix, convert, verify, validate, card, push. If a gate fails, nothing is pushed; exit code 3.

    Example: `streamquant run examples/hermes-4-14b.yaml --dry-run`
    """
    from streamquant.publish.release.release_file import stage_name

    begin = stage_name(first, "--from") if first is not None else None
    single = stage_name(only, "--only") if only is not None else None
    options = streamquant.ReleaseOptions(begin, single, dry_run, ("streamquant", *sys.argv[1:]))
    with console_listener("run the same command again; it uses what is in the cache") as listener:
        streamquant.run(release, options, listener=listener)


def say_pushed(pushed: "Sequence[Pushed]") -> None:
    """A line for each repository, and what there is to know."""
    for one in pushed:
        from streamquant.publish.upload.push_report import summary

        for note in one.notes:
            say_note(note)
        print_line(summary(one))
