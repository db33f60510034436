"""What the stages of a release share: the source, the plan, what is known, and what a stage is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.open import open_source
from streamquant.publish.release.release_file import ReleaseFile, Stage
from streamquant.publish.release.release_state import Entry, State, key_of
from streamquant.publish.results import VariantFolder, read_folder
from streamquant.quant.errors import GateFailedError, StreamquantError

if TYPE_CHECKING:
    from streamquant.model.forward import Setting

PACKAGES = ("streamquant", "numpy", "tokenizers", "torch", "transformers")
"""Versions that numbers of the forward pass depend on."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage, in words."""

    stage: Stage
    state: Literal["done", "skipped", "would run"]
    text: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.state}: {self.text}"


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told what happens: outcomes, steps of a long stage (what, done, all), and remarks."""

    on_outcome: Callable[[Outcome], None] = lambda _outcome: None
    on_step: Callable[[str, int, int], None] = lambda _what, _done, _total: None
    on_note: Callable[[str], None] = lambda _text: None


def gates_failed(wrong: Sequence[str], what: str) -> GateFailedError:
    """The error of gates that failed."""
    return GateFailedError(
        "gates failed" if len(wrong) > 1 else "a gate failed",
        found="; ".join(wrong),
        required="every gate passed",
        hint=f"{what}: leave the variant out, change `gates`, or set `push.without_report: true`",
    )


class Road:
    """What the stages of one run share. The source is opened when a stage asks for it first."""

    def __init__(
        self,
        file: ReleaseFile,
        state: State,
        chosen: tuple[Stage, ...],
        watch: Watch,
        *,
        command: tuple[str, ...] = (),
        forced: bool = False,
        dry_run: bool = False,
    ) -> None:
        self.file, self.state, self.chosen, self.watch, self.command = file, state, chosen, watch, command
        self.forced, self.dry_run = forced, dry_run
        self.pending = False
        """Whether an earlier stage of a dry run would make something new."""
        self.failed_gates: tuple[str, ...] = ()
        self._plan: tuple[str, Plan] | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source, its headers read."""
        return open_source(self.file.model, out=self.file.out)

    @property
    def known_source(self) -> Path | None:
        """A folder with the small files of the source, unless it would have to be opened for them first."""
        local = Path(self.file.model)
        opened = self.__dict__.get("checkpoint")
        return local if local.is_dir() else opened.folder if opened is not None else None

    @property
    def name(self) -> str:
        """The name of the model in file names."""
        return self.file.options.name or self.checkpoint.name

    @property
    def source(self) -> list[Any]:
        """What identifies the source."""
        return [[file.identity for file in self.checkpoint.files], key_of(dict(self.checkpoint.config))]

    @cached_property
    def weights(self) -> Path:
        """A local folder with the whole source. Fetches it from the Hub if need be. Raises StreamquantError."""
        if not self.checkpoint.remote or self.checkpoint.hub is None:
            return self.checkpoint.folder
        from streamquant.convert.source.snapshot import fetch_snapshot

        return fetch_snapshot(self.checkpoint, self.watch.on_step, self.watch.on_note)

    @property
    def imatrix_path(self) -> Path | None:
        """Where the importance matrix is, or will be."""
        stage = self.file.imatrix
        if stage is None:
            return None
        return stage.file or self.file.out / f"{self.name}.imatrix.gguf"

    def plan(self, imatrix: ImportanceMatrix | None) -> Plan:
        """The plan of all variants with an importance matrix; kept, as it takes seconds."""
        known = "" if imatrix is None else imatrix.sha256
        if self._plan is None or self._plan[0] != known:
            options = replace(self.file.options, imatrix=imatrix)
            self._plan = known, make_plan(self.checkpoint, self.file.recipes, options)
        return self._plan[1]

    def imatrix(self) -> ImportanceMatrix | None:
        """The importance matrix that is there. Raises StreamquantError if it is not."""
        path, stage = self.imatrix_path, self.file.imatrix
        if path is None or stage is None:
            return None
        return read_imatrix(path).select(stage.include_weights, stage.exclude_weights)

    def folders(self) -> list[VariantFolder]:
        """The folders of this release's variants. Raises StreamquantError if nothing is converted."""
        made = self.state["convert"].made.get("folders", [])
        if not made:
            raise StreamquantError(
                "nothing is converted yet",
                where=str(self.file.out),
                required="the stage convert",
                hint="leave --from and --only out",
            )
        return [read_folder(self.file.out / str(name)) for name in made]

    @property
    def stopped_by_gates(self) -> bool:
        """Whether a gate failed, and the file does not say to publish all the same."""
        push = self.file.push
        return bool(self.failed_gates) and not (push is not None and push.without_report)

    @property
    def report_folder(self) -> Path | None:
        """Where the report is, if there is one."""
        stage = self.file.validate
        return stage.report if stage is not None and (stage.report / "report.json").is_file() else None

    def setting(self, dtype: str | None) -> "Setting":
        """Where the forward pass runs, and in what."""
        from streamquant.model.forward import default_setting

        found = default_setting(self.file.device)
        return found if dtype is None else replace(found, dtype="bf16" if dtype == "bf16" else "f32")

    def versions(self, *more: str) -> dict[str, str]:
        """Versions of packages, of those that are installed."""
        found = {}
        for package in (*PACKAGES, *more):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found


class Work(ABC):
    """One stage of a run."""

    name: ClassVar[Stage]

    def __init__(self, road: Road) -> None:
        self.road, self.file, self.watch = road, road.file, road.watch

    @property
    def entry(self) -> Entry:
        """What is known of the stage."""
        return self.road.state[self.name]

    @cached_property
    def key(self) -> str:
        """The hash of the inputs."""
        return key_of(self.inputs())

    def outcome(self) -> Outcome:
        """Skip the stage, or run it; in a dry run tell what it would do."""
        if self.road.dry_run and self.road.pending:
            return Outcome(self.name, "would run", self.would())
        if not self.road.forced and (found := self.found()) is not None:
            return Outcome(self.name, "skipped", found)
        if self.road.dry_run:
            return Outcome(self.name, "would run", self.would())
        self.before()
        self.road.state.begin(self.name, self.key)
        text, outputs = self.run()
        self.road.state.finish(self.name, self.key, outputs)
        return Outcome(self.name, "done", text)

    @abstractmethod
    def inputs(self) -> object:
        """JSON of all that the outputs depend on."""

    def found(self) -> str | None:
        """In words what lies there already, if the stage was done with the same inputs."""
        return "as before" if self.entry.done == self.key and self.road.state.is_intact(self.name) else None

    def before(self) -> None:  # noqa: B027 - most stages have nothing to clear away
        """Clear away what an earlier run made of other inputs."""

    @abstractmethod
    def would(self) -> str:
        """In words what the stage would do."""

    @abstractmethod
    def run(self) -> tuple[str, list[Path]]:
        """Do it; returns what was done in words, and the small files whose hashes tell that it is done."""
