"""`card`, `push`, `convert_and_push` and `run`: what goes to the Hub."""

from pathlib import Path

from streamquant.api.conversion import Variants, plan_of
from streamquant.api.models import Model
from streamquant.api.paths import paths_told
from streamquant.convert.conversion import Conversion
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.run.device import choose_device
from streamquant.files.listener import SILENT, Listener
from streamquant.publish.cards.card import write_cards
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.release.release import run_release
from streamquant.publish.release.release_file import read_release
from streamquant.publish.release.release_run import ReleaseOptions, StageOutcome
from streamquant.publish.upload import push as upload
from streamquant.publish.upload import streaming
from streamquant.publish.upload.options import EarlyPush, PushOptions
from streamquant.publish.upload.push import Pushed


@paths_told
def card(folder: str | Path, options: CardOptions | None = None, *, report: str | Path | None = None) -> list[Path]:
    """Write the model card, README.md, of every variant, from its manifest and the report of exactly its files.

    Args:
        folder: a variant folder, or the output folder with several.
        options: the repository, the original, and who made the variants.
        report: folder of the report; by default `report` beside or in the folder.

    Returns the cards.

    Raises:
        UsageError: for a README.md that is somebody's own, and for names that cannot be.
        StreamquantError: for a broken manifest or report. Nothing is written then.
    """
    return write_cards(Path(folder), options or CardOptions(), None if report is None else Path(report))


@paths_told
def push(
    folder: str | Path, repo: str, options: PushOptions | None = None, *, listener: Listener = SILENT
) -> tuple[Pushed, ...]:
    """Publish variants on the Hugging Face Hub with their cards and reports. Files that are there are not sent again.

    Args:
        folder: a variant folder, or the output folder with several.
        repo: ORG/NAME; for an output folder the stem, to which -GGUF and so on is added.
        options: private or public, the branch, and what to do about variants that were not measured.
        listener: hears of the task "uploading" in bytes, and of waits.

    Returns a record for each repository.

    Raises:
        GateFailedError: for a variant that was not measured or failed a gate; nothing was published.
        UsageError: for names and options that cannot be.
        StreamquantError: for everything that the Hub or the network says.
    """
    return upload.push(Path(folder), repo, options or PushOptions(), listener)


@paths_told
def convert_and_push(
    model: Model,
    to: Variants,
    out: str | Path,
    push: EarlyPush,
    options: ConversionOptions | None = None,
    *,
    run: RunOptions | None = None,
    listener: Listener = SILENT,
) -> tuple[Conversion, tuple[Pushed, ...]]:
    """Convert a model, and upload each file as soon as it is finished.

    The arguments are those of `convert`, and `push`: the repository, and whether each file is deleted when the Hub
    holds it. Raises what `convert` and `push` raise; a repeated call goes on where this one stopped, and sends nothing
    twice.
    """
    run, out = run or RunOptions(), Path(out)
    choose_device(run.device)  # refuses before the Hub is asked
    return streaming.convert_and_push(plan_of(model, to, options, out, listener), out, push, run, listener)


@paths_told
def run(
    release: str | Path, options: ReleaseOptions | None = None, *, listener: Listener = SILENT
) -> list[StageOutcome]:
    """Run a release file: importance matrix, variants, validation, cards, push. What is done already is skipped.

    Args:
        release: the YAML file: source, variants, texts, gates, repository.
        options: which stages to run, and whether to only tell what each would do.
        listener: hears of the outcome of each stage, and of the tasks of all stages.

    Returns what became of each stage.

    Raises:
        GateFailedError: for a gate that failed; nothing was pushed.
        UsageError: for a release file or a stage that cannot be.
        StreamquantError: for every other fault of a stage.
    """
    return run_release(read_release(Path(release)), options or ReleaseOptions(), listener)
