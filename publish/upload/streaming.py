"""Convert and publish at the same time: what is finished goes to the Hub while the rest is made."""

from dataclasses import replace
from pathlib import Path

from streamquant.convert.conversion import Conversion, convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.records import Plan
from streamquant.files.listener import SILENT, Listener
from streamquant.publish.upload.delivery import deliver, plan_repositories
from streamquant.publish.upload.limits import check_plan
from streamquant.publish.upload.options import EarlyPush
from streamquant.publish.upload.push import Pushed, prepare_push


def convert_and_push(
    plan: Plan, out: Path, where: EarlyPush, options: RunOptions | None = None, listener: Listener = SILENT
) -> tuple[Conversion, tuple[Pushed, ...]]:
    """`convert`, with each finished file uploaded at once; cards, manifests and small files follow at the end.

    Raises what `convert` and `push` raise; a repeated call goes on where this one stopped, and sends nothing twice.
    """
    check_plan(plan)
    done = convert(plan, out, options, listener, deliver(plan, out, where, listener))
    rest = replace(where.options, without_report=True, source=plan.checkpoint.folder)  # EarlyPush has been checked
    pushed: list[Pushed] = []
    for folder, name in plan_repositories(plan, where.repo).items():
        pushed += prepare_push(out / folder, name, rest, listener).send()
    return done, tuple(pushed)
