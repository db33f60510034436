"""What the stages of a release share: how it is run, the source, the plan, and what is known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.open import open_source
from streamquant.files.listener import SILENT, Listener
from streamquant.publish.release.release_file import ReleaseFile, StageName
from streamquant.publish.release.release_state import ReleaseState, key_of
from streamquant.publish.results import VariantFolder, read_folder
from streamquant.quant.errors import GateFailedError, StreamquantError, UsageError

if TYPE_CHECKING:
    from streamquant.model.forward import Setting

PACKAGES = ("streamquant", "numpy", "tokenizers", "torch", "transformers")
"""Versions that numbers of the forward pass depend on."""


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What became of a stage, in words."""

    stage: StageName
    state: Literal["done", "skipped", "would run"]
    text: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.state}: {self.text}"


@dataclass(frozen=True, slots=True)
class ReleaseOptions:
    """How a release is run."""

    first: StageName | None = None
    """Run this stage and those after it, done or not, without a look at those before."""
    only: StageName | None = None
    """Run this stage alone, done or not."""
    dry_run: bool = False
    """Tell what each stage would do, and write nothing."""
    command: tuple[str, ...] = ()
    """The command line, which the report records."""

    @property
    def forced(self) -> bool:
        """Whether stages run that are done already."""
        return self.first is not None or self.only is not None

    def stages_of(self, file: ReleaseFile) -> tuple[StageName, ...]:
        """The stages to run, in their order. Raises UsageError for one that the file does not ask for."""
        if self.first is not None and self.only is not None:
            raise UsageError("--from and --only contradict each other", required="one of them")
        for option, stage in (("--from", self.first), ("--only", self.only)):
            if stage is not None and stage not in file.stages:
                raise UsageError(
                    "a stage that the file does not ask for",
                    where=option,
                    found=stage,
                    required=", ".join(file.stages),
                    hint=f"add `{stage}` to {file.path.name}",
                )
        if self.only is not None:
            return (self.only,)
        return file.stages[file.stages.index(self.first) :] if self.first is not None else file.stages


def gates_failed(wrong: Sequence[str], what: str) -> GateFailedError:
    """The error of gates that failed."""
    return GateFailedError(
        "gates failed" if len(wrong) > 1 else "a gate failed",
        found="; ".join(wrong),
        required="every gate passed",
        hint=f"{what}: leave the variant out, change `gates`, or set `push.without_report: true`",
    )


class ReleaseRun:
    """What the stages of one run share. The source is opened when a stage asks for it first."""

    def __init__(
        self,
        file: ReleaseFile,
        state: ReleaseState,
        options: ReleaseOptions = ReleaseOptions(),
        listener: Listener = SILENT,
    ) -> None:
        self.file, self.state, self.options, self.listener = file, state, options, listener
        self.pending = False
        """Whether an earlier stage of a dry run would make something new."""
        self.failed_gates: tuple[str, ...] = ()
        self._plan: tuple[str, Plan] | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source, its headers read."""
        return open_source(self.file.model, out=self.file.out, listener=self.listener)

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
        from streamquant.convert.source.snapshot import whole_folder

        return whole_folder(self.checkpoint, self.listener)

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
        names = self.state["convert"].made.folders
        if not names:
            raise StreamquantError(
                "nothing is converted yet",
                where=str(self.file.out),
                required="the stage convert",
                hint="leave --from and --only out",
            )
        return [read_folder(self.file.out / name) for name in names]

    @property
    def stopped_by_gates(self) -> bool:
        """Whether a gate failed, and the file does not say to publish all the same."""
        push = self.file.push
        return bool(self.failed_gates) and not (push is not None and push.options.without_report)

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
