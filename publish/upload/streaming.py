"""Convert and publish at the same time: what is finished goes to the Hub while the rest is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamquant.convert.conversion import Conversion, Fetching, convert, disk_of
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.disk import Disk, peak_disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.hub.repo import OnBytes
from streamquant.publish.upload.delivery import ROOM, check_early_push, deliver, plan_repositories
from streamquant.publish.upload.limits import check_plan
from streamquant.publish.upload.push import Pushed, Wish, push
from streamquant.quant.errors import UsageError


@dataclass(frozen=True, slots=True)
class EarlyPush:
    """Where a conversion sends its files."""

    repo: str
    """ORG/NAME, the stem for several folders."""
    private: bool
    without_report: bool
    revision: str | None = None
    delete: bool = False
    """Delete each file of weights when the Hub holds it."""


def early_push(
    repo: str | None, *, private: bool, without_report: bool, revision: str | None, delete: bool
) -> EarlyPush | None:
    """What the options of `convert` ask for; None without --push.

    Raises UsageError for options that need --push, and for one that would publish what nobody has measured yet.
    """
    if repo is not None:
        check_early_push(private=private, without_report=without_report)
        return EarlyPush(repo, private, without_report, revision, delete)
    given = {"--private": private, "--without-report": without_report, "--push-revision": revision is not None}
    given["--delete-after-upload"] = delete
    if options := [option for option, value in given.items() if value]:
        raise UsageError("an option of uploads without an upload", found=", ".join(options), required="--push ORG/NAME")
    return None


def disk_with_delivery(plan: Plan, spool_gib: float | None, jobs: int, *, delete: bool, room: int = ROOM) -> Disk:
    """What a conversion takes on the disk at most, if files are deleted as they are uploaded."""
    disk = disk_of(plan, spool_gib)
    if not delete:
        return disk
    peak = min(disk.peak, peak_disk(plan, room, disk.spool, delete=True, jobs=jobs))
    return Disk(peak, disk.spool, delivered=True)


def convert_and_push(
    checkpoint: Checkpoint,
    recipes: Sequence[Recipe],
    out: Path,
    options: ConversionOptions,
    where: EarlyPush,
    *,
    jobs: int,
    device: str,
    fetching: Fetching,
    on_start: Callable[[Plan], None],
    on_progress: Callable[[int], None],
    on_upload: OnBytes,
) -> tuple[Conversion, tuple[Pushed, ...]]:
    """`convert`, with each finished file uploaded at once; cards, manifests and small files follow at the end.

    Raises what `convert` and `push` raise; a repeated call goes on where this one stopped, and sends nothing twice.
    """
    plan = make_plan(checkpoint, recipes, options)
    check_plan(plan)
    disk = disk_with_delivery(plan, fetching.spool_gib, jobs, delete=where.delete)
    delivery = deliver(
        plan,
        out,
        where.repo,
        private=where.private,
        without_report=where.without_report,
        revision=where.revision,
        delete=where.delete,
        on_bytes=on_upload,
        on_wait=fetching.on_wait,
    )
    done = convert(
        checkpoint,
        recipes,
        out,
        options,
        jobs=jobs,
        device=device,
        fetching=fetching,
        delivery=delivery,
        disk=disk,
        on_start=on_start,
        on_progress=on_progress,
    )
    wish = Wish(where.private, where.revision, without_report=True)  # check_early_push has had its say
    pushed: list[Pushed] = []
    for folder, name in plan_repositories(plan, where.repo).items():
        pushed += push(out / folder, name, wish, source=checkpoint.folder, on_bytes=on_upload, on_wait=fetching.on_wait)
    return done, tuple(pushed)
