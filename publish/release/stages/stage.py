"""What a stage of a release is: its inputs, what it would do, and whether that is done."""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from streamquant.publish.release.release_file import StageName
from streamquant.publish.release.release_run import ReleaseRun, StageOutcome
from streamquant.publish.release.release_state import StageState, key_of


class Stage(ABC):
    """One stage of a run of a release."""

    name: ClassVar[StageName]

    def __init__(self, release: ReleaseRun) -> None:
        self.release, self.file, self.listener = release, release.file, release.listener

    @abstractmethod
    def perform(self) -> StageOutcome:
        """Do what is to be done, and say what became of it. Raises StreamquantError."""


class SkippableStage(Stage):
    """A stage that is skipped when it was done with the same inputs."""

    @property
    def state(self) -> StageState:
        """What is known of the stage."""
        return self.release.state[self.name]

    @cached_property
    def key(self) -> str:
        """The hash of the inputs."""
        return key_of(self.inputs())

    def perform(self) -> StageOutcome:
        """Skip the stage, or run it; in a dry run tell what it would do."""
        options = self.release.options
        if options.dry_run and self.release.pending:
            return StageOutcome(self.name, "would run", self.describe())
        if not options.forced and (reason := self.skip_reason()) is not None:
            return StageOutcome(self.name, "skipped", reason)
        if options.dry_run:
            return StageOutcome(self.name, "would run", self.describe())
        self.prepare()
        self.release.state.begin(self.name, self.key)
        text, outputs = self.run()
        self.release.state.finish(self.name, self.key, outputs)
        return StageOutcome(self.name, "done", text)

    @abstractmethod
    def inputs(self) -> object:
        """JSON of all that the outputs depend on."""

    def skip_reason(self) -> str | None:
        """What is there already, in words, if the stage was done with the same inputs; else None."""
        return "as before" if self.state.done == self.key and self.release.state.is_intact(self.name) else None

    def prepare(self) -> None:
        """Clear away what an earlier run made of other inputs."""

    @abstractmethod
    def describe(self) -> str:
        """What the stage would do, in words."""

    @abstractmethod
    def run(self) -> tuple[str, list[Path]]:
        """Do it; returns what was done, in words, and the small files whose hashes show that it is done."""
