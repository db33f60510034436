"""Convert and publish at the same time: what is finished goes to the Hub while the rest is made."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from streamquant.convert.conversion import Conversion, Fetching, convert, disk_of
from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.disk import Disk, peak_disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.recipe import Recipe
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.listener import Listener
from streamquant.publish.upload.delivery import deliver, plan_repositories
from streamquant.publish.upload.limits import check_plan
from streamquant.publish.upload.options import ROOM, EarlyPush
from streamquant.publish.upload.push import Pushed, prepare_push


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
    listener: Listener,
) -> tuple[Conversion, tuple[Pushed, ...]]:
    """`convert`, with each finished file uploaded at once; cards, manifests and small files follow at the end.

    Raises what `convert` and `push` raise; a repeated call goes on where this one stopped, and sends nothing twice.
    """
    plan = make_plan(checkpoint, recipes, options)
    check_plan(plan)
    disk = disk_with_delivery(plan, fetching.spool_gib, jobs, delete=where.delete)
    delivery = deliver(plan, out, where, listener)
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
    rest = replace(where.options, without_report=True, source=checkpoint.folder)  # EarlyPush has been checked
    pushed: list[Pushed] = []
    for folder, name in plan_repositories(plan, where.repo).items():
        pushed += prepare_push(out / folder, name, rest, listener).send()
    return done, tuple(pushed)
