"""What the sections of a validation share: the models, the options, and what was found so far."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from streamquant.convert.source.model_folder import name_of
from streamquant.files.folders import real_path
from streamquant.files.listener import Listener
from streamquant.model.problem import Problem
from streamquant.model.variants.open import open_variant
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.agreement import EngineAgreement
from streamquant.validate.engines.engine import EngineError, EngineLoadError
from streamquant.validate.options import ValidationOptions
from streamquant.validate.readback.measured_files import MeasuredFile, measured_files, weight_files
from streamquant.validate.report.data import NotRun, VariantReport
from streamquant.validate.sections import Section
from streamquant.validate.text.behaviour import BehaviourReport
from streamquant.validate.text.chat import ChatReport
from streamquant.validate.text.template_lints import Lint
from streamquant.validate.text.tokens import TokenReport


@dataclass(eq=False, slots=True)
class Candidate:
    """A variant that is validated, and what was found of it: what becomes its VariantReport."""

    path: Path
    label: str
    files: tuple[MeasuredFile, ...]
    variant: Variant | None = None
    problems: list[Problem] = field(default_factory=list)
    tokens: TokenReport | None = None
    chat: ChatReport | None = None
    lints: tuple[Lint, ...] | None = None
    engine: EngineAgreement | None = None
    behaviour: BehaviourReport | None = None
    unloadable: StreamquantError | None = None
    """Why its engine does not load tokenizer and chat template; then it loads the whole model no better."""

    @property
    def readable(self) -> bool:
        """Whether it could be opened, and nothing has shown since that it is broken."""
        return self.variant is not None

    @property
    def file(self) -> Path:
        """What an engine is given: of a split set the first file."""
        return self.variant.path if self.variant is not None else self.path

    def unreadable(self, error: StreamquantError) -> None:
        """Note that the variant cannot be read; its other sections do not run."""
        self.variant = None
        self.problems.append(Problem("unreadable", "error", "the variant cannot be read", found=one_line(error)))

    def report(self) -> VariantReport:
        """All that was found."""
        return VariantReport(
            self.label, str(self.file), self.files, tuple(self.problems), self.tokens, self.chat, self.lints,
            self.engine, self.behaviour,
        )  # fmt: skip


@dataclass(slots=True)
class ValidationRun:
    """One call of `validate` or `chat_check`."""

    original: Variant
    candidates: list[Candidate]
    options: ValidationOptions
    listener: Listener
    not_run: list[NotRun] = field(default_factory=list)
    original_lints: tuple[Lint, ...] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Of the engines that took part."""

    def skip(self, section: Section, reason: str, candidate: Candidate | None = None) -> None:
        """Note why a section does not run, for one candidate or for all."""
        self.not_run.append(NotRun(section, candidate.label if candidate is not None else None, reason))

    def nothing_to_check(self, section: Section, reason: str) -> None:
        """Note that a section has nothing to do, so that nothing remains unchecked."""
        self.not_run.append(NotRun(section, None, reason, nothing_to_check=True))

    def skip_unreadable(self, candidate: Candidate, sections: Sequence[Section]) -> None:
        """Note that sections do not run because the candidate cannot be read."""
        for section in sections:
            self.skip(section, "the variant cannot be read", candidate)

    def failed(self, sections: Sequence[Section], error: StreamquantError, candidate: Candidate | None) -> None:
        """Note that sections ended with an error; one of the engine at work on the candidate is a problem of it.

        A package that is missing is none, nor what another model does to its engine.
        """
        for section in sections:
            self.skip(section, one_line(error), candidate)
        if candidate is not None and isinstance(error, EngineError) and error.model == candidate.file:
            what = "the engine fails on the file"
            if isinstance(error, EngineLoadError):
                what = "the engine refuses the file"
            problem = Problem("engine", "error", what, found=one_line(error))
            if problem not in candidate.problems:  # an engine that has ended says so in every section
                candidate.problems.append(problem)

    @contextmanager
    def section(self, section: Section, candidate: Candidate | None) -> Iterator[None]:
        """Note the error of a section that fails; the others go on."""
        try:
            yield
        except StreamquantError as error:
            self.failed((section,), error, candidate)


def one_line(error: Exception) -> str:
    """An error as a sentence: its lines in one, single spaces."""
    return "; ".join(" ".join(line.split()) for line in str(error).splitlines())


def open_candidates(paths: Sequence[Path]) -> list[Candidate]:
    """Open every variant; one that is broken is kept with its error. Raises UsageError for a wrong path."""
    if not paths:
        raise UsageError("no variant to validate", required="at least one")
    candidates = []
    for path in paths:
        if not path.exists():
            raise UsageError("no such variant", where=str(path), required="a .gguf file or a checkpoint folder")
        try:
            variant = open_variant(path)
            measured = measured_files(variant.files)
            candidates.append(Candidate(path, variant.label, measured, variant, list(variant.problems)))
        except UsageError:
            raise
        except StreamquantError as error:
            label = path.stem if path.suffix == ".gguf" else name_of(path)
            candidates.append(Candidate(path, label, measured_files(weight_files(path))))
            candidates[-1].unreadable(error)
    files = Counter(real_path(candidate.file) for candidate in candidates)
    if twice := [path for path, count in files.items() if count > 1]:
        raise UsageError("a variant is given twice", found=str(twice[0]))
    counts = Counter(candidate.label for candidate in candidates)
    for candidate in candidates:
        if counts[candidate.label] > 1:
            candidate.label = f"{real_path(candidate.path).parent.name}/{candidate.label}"
    return candidates
