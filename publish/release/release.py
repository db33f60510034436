"""A release: plan, importance matrix, variants, verification, validation, cards, push.

Each stage is skipped when what it would make is there already, made from the same inputs (release_state.py). A stage
whose inputs changed runs again, and so do those whose inputs it makes. A run that was killed is repeated: it goes on.
Variants that a changed input makes obsolete are replaced, but only those that this release made itself.
"""

from streamquant.files.listener import SILENT, Listener
from streamquant.publish.release.release_file import ReleaseFile, StageName
from streamquant.publish.release.release_run import ReleaseOptions, ReleaseRun, StageOutcome, gates_failed
from streamquant.publish.release.release_state import ReleaseState, locked
from streamquant.publish.release.stages.card import CardStage
from streamquant.publish.release.stages.convert import ConvertStage
from streamquant.publish.release.stages.imatrix import ImatrixStage
from streamquant.publish.release.stages.plan import PlanStage
from streamquant.publish.release.stages.push import PushStage
from streamquant.publish.release.stages.stage import Stage
from streamquant.publish.release.stages.validate import ValidateStage
from streamquant.publish.release.stages.verify import VerifyStage

STAGE_CLASSES: dict[StageName, type[Stage]] = {
    stage.name: stage
    for stage in (PlanStage, ImatrixStage, ConvertStage, VerifyStage, ValidateStage, CardStage, PushStage)
}


def run_release(
    file: ReleaseFile,
    options: ReleaseOptions = ReleaseOptions(),
    listener: Listener = SILENT,
) -> list[StageOutcome]:
    """Run the stages of a release in their order; what is done is skipped. `listener` hears of each outcome at once.

    Raises UsageError, StreamquantError, and GateFailedError before anything is pushed.
    """
    chosen = options.stages_of(file)
    outcomes: list[StageOutcome] = []
    with locked(file.path):
        state = ReleaseState(file.out / f".{file.path.stem}.release.json")
        run = ReleaseRun(file, state, options, listener)
        for name in chosen:
            outcome = STAGE_CLASSES[name](run).perform()
            run.pending |= outcome.state == "would run"
            outcomes.append(outcome)
            listener.stage_finished(outcome)
    if run.stopped_by_gates:
        raise gates_failed(run.failed_gates, "the release is not to be published")
    return outcomes
