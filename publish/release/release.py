"""The whole road of a release: plan, importance matrix, variants, verification, validation, cards, push.

Each stage is skipped when what it would make lies there and is of the same inputs (release_state.py); a stage
whose inputs changed runs again, and so do those whose inputs it makes. A run that was killed is repeated: it goes on.
Variants that a changed input makes obsolete are replaced, but only those that this release made itself.
"""

from collections.abc import Sequence

from streamquant.publish.release.release_file import ReleaseFile, Stage
from streamquant.publish.release.release_run import Outcome, Road, Watch, Work, gates_failed
from streamquant.publish.release.release_state import State, alone
from streamquant.publish.release.stages_making import ConvertWork, ImatrixWork, PlanWork
from streamquant.publish.release.stages_publishing import CardWork, PushWork, ValidateWork, VerifyWork
from streamquant.quant.errors import UsageError

WORKS: dict[Stage, type[Work]] = {
    work.name: work for work in (PlanWork, ImatrixWork, ConvertWork, VerifyWork, ValidateWork, CardWork, PushWork)
}


def run_release(
    file: ReleaseFile,
    *,
    first: Stage | None = None,
    only: Stage | None = None,
    dry_run: bool = False,
    command: Sequence[str] = (),
    watch: Watch | None = None,
) -> list[Outcome]:
    """Run the stages of a release in their order; what is done is skipped.

    `first` runs a stage and those after it whether they are done or not, without a look at those before; `only` that
    one. A dry run tells what each would do, and writes nothing. `command` is recorded in the report. Raises UsageError,
    StreamquantError, and GateFailedError before anything is pushed.
    """
    chosen = _choose(file, first, only)
    outcomes: list[Outcome] = []
    with alone(file.path):
        state = State(file.out / f".{file.path.stem}.release.json")
        forced = first is not None or only is not None
        road = Road(file, state, chosen, watch or Watch(), command=tuple(command), forced=forced, dry_run=dry_run)
        for name in chosen:
            outcome = WORKS[name](road).outcome()
            road.pending |= outcome.state == "would run"
            outcomes.append(outcome)
            road.watch.on_outcome(outcome)
    if road.stopped_by_gates:
        raise gates_failed(road.failed_gates, "the release is not to be published")
    return outcomes


def _choose(file: ReleaseFile, first: Stage | None, only: Stage | None) -> tuple[Stage, ...]:
    if first is not None and only is not None:
        raise UsageError("--from and --only contradict each other", required="one of them")
    for option, stage in (("--from", first), ("--only", only)):
        if stage is not None and stage not in file.stages:
            raise UsageError(
                "a stage that the file does not ask for",
                where=option,
                found=stage,
                required=", ".join(file.stages),
                hint=f"add `{stage}` to {file.path.name}",
            )
    if only is not None:
        return (only,)
    return file.stages[file.stages.index(first) :] if first is not None else file.stages
