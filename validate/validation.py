"""The whole validation: the comparison, and tokens, chat, engines and behaviour in the real engines, as one report.

A section that cannot run does not end the others: the report says which, for which variant, and why. A variant that
cannot be read is a finding like any other. Only a fault of the original, of the texts or of the command ends it all.
"""

import datetime
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.files.folders import cache_folder
from streamquant.model.corpus import encode_plain, read_corpus, read_text, read_tokenizer
from streamquant.model.forward import Head, Lane, Setting, free_memory, run_layers
from streamquant.model.problem import Problem
from streamquant.model.variants.open import open_variant
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.agreement import LENGTHS, EngineAgreement, engine_agreement, prompts_from
from streamquant.validate.engines.engine import EngineFacts, Generation, Rendered, TemplateRequest, TopLogprobs
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.gates import Gates, Measured, judge
from streamquant.validate.logits.comparison import Comparison, NoiseKind, VariantResult, compare
from streamquant.validate.readback.measured_files import MeasuredFile, measured_files, weight_files
from streamquant.validate.report.data import SCHEMA, NotRun, Report, VariantReport, this_machine
from streamquant.validate.sections import ANSWER_TOKENS, SKIPPABLE, Section
from streamquant.validate.text.behaviour import BehaviourReport, compare_behaviour
from streamquant.validate.text.chat import ChatReport, compare_chat, folder_templates
from streamquant.validate.text.template_lints import Lint, lint_checkpoint, lint_gguf
from streamquant.validate.text.tokens import TokenReport, check_token_types, compare_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TEXT_CHARACTERS = 100_000
"""Of each text, how much is tokenized by every engine."""
ENGINE_CONTEXT = 2048
"""Tokens of a prompt and its answer together, at most."""
CACHE_BYTES = 20 << 30
"""Bytes of hidden states that stay in the cache."""
NAMED = 5
"""Tokens that a problem names."""
ROOM = 0.9
"""Share of the free memory that a model may fill in its engine."""
PACKAGES = ("streamquant", "xllamacpp", "jinja2", "accelerate")
"""Packages that take part beside those of the comparison."""

Progress = Callable[[str, int, int], None]
"""Gets what is being done, steps done, and steps in all."""


@dataclass(frozen=True, slots=True)
class Job:
    """How to validate.

    skip          sections to leave out (SKIPPABLE of validate/sections.py)
    noise         noise floors to measure, see compare
    cache         folder for the original's hidden states; a second run over the same tokens takes them from there
    tokenizer     of the texts: a folder with tokenizer.json, by default the original
    lengths       tokens of the prompts of the section engines
    """

    texts: tuple[Path, ...]
    setting: Setting
    context: int = 512
    chunks: int | None = None
    skip: frozenset[str] = frozenset()
    noise: tuple[NoiseKind, ...] = ("batch",)
    gates: Gates = field(default_factory=Gates)
    cache: Path | None = None
    tokenizer: Path | None = None
    answer_tokens: int = ANSWER_TOKENS
    lengths: tuple[int, ...] = LENGTHS
    command: tuple[str, ...] = ()


@dataclass(eq=False, slots=True)
class _Subject:
    """A variant on its way to a VariantReport."""

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

    @property
    def readable(self) -> bool:
        return self.variant is not None

    @property
    def file(self) -> Path:
        """What an engine is given: of a split set the first file."""
        return self.variant.path if self.variant is not None else self.path

    def unreadable(self, error: StreamquantError) -> None:
        """Note that the variant cannot be read; its other sections do not run."""
        self.variant = None
        self.problems.append(Problem("unreadable", "error", "the variant cannot be read", found=one_line(error)))


@dataclass(slots=True)
class _State:
    """What the sections share."""

    original: Variant
    subjects: list[_Subject]
    job: Job
    progress: Progress
    not_run: list[NotRun] = field(default_factory=list)
    original_lints: tuple[Lint, ...] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def skip(self, section: Section, reason: str, subject: _Subject | None = None) -> None:
        self.not_run.append(NotRun(section, subject.label if subject is not None else None, reason))

    def wants(self, *sections: Section) -> tuple[Section, ...]:
        return tuple(section for section in sections if section not in self.job.skip)


def validate(
    original: Path,
    variants: Sequence[Path],
    job: Job,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Report:
    """Compare variants with their original in every way that the job does not skip.

    Raises UsageError for a wrong command, StreamquantError if the original or a text cannot be read.
    """
    base = open_variant(original)
    state = _State(base, _open(variants), job, on_progress)
    for section in SKIPPABLE:
        if section in job.skip:
            state.skip(section, "left out by --skip")
    folder = job.tokenizer or base.path
    corpus = read_corpus(job.texts, folder, job.context, job.chunks)
    texts = {path.name: [read_text(path)[:TEXT_CHARACTERS]] for path in job.texts}
    backend = read_tokenizer(folder)
    # Tokens and chat first: they cost seconds, and a fault there is the most common one.
    _check_tokenizers(state, texts)
    comparison = _compare(state, lambda readable: compare(
        base, readable, corpus, job.setting,
        noise=() if "noise" in job.skip else job.noise, tensors="tensors" not in job.skip, cache=job.cache,
        on_progress=lambda stage, done, total: on_progress(STAGES[stage], done, total),
    ))  # fmt: skip
    ids = encode_plain(backend, next(iter(texts.values()))[0])
    _check_engines(state, ids)
    return _report(state, comparison)


STAGES = {"layers": "layers", "head": "logits and divergence"}


def chat_check(
    original: Variant, variants: Sequence[Path], on_progress: Progress = lambda _what, _done, _total: None
) -> tuple[tuple[VariantReport, ...], tuple[Lint, ...], tuple[NotRun, ...]]:
    """Tokens, chat templates and lints alone, of torture strings: no weight is read.

    Returns the variants, the original's lints, and what did not run. Raises what `validate` raises.
    """
    state = _State(original, _open(variants), Job((), Setting()), on_progress)
    _check_tokenizers(state, {})
    return tuple(map(_variant_report, state.subjects)), state.original_lints or (), tuple(state.not_run)


def default_cache() -> Path:
    """The folder for hidden states of originals in the user's cache."""
    return cache_folder() / "hidden-states"


def prune_cache(folder: Path, keep_bytes: int = CACHE_BYTES) -> None:
    """Remove the oldest hidden states of a cache folder until `keep_bytes` are left; the newest stays."""
    files = sorted(folder.glob("hidden-states-*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for number, path in enumerate(files):
        total += path.stat().st_size
        if number and total > keep_bytes:
            path.unlink(missing_ok=True)


def one_line(error: Exception) -> str:
    """An error as a sentence: its lines in one, single spaces."""
    return "; ".join(" ".join(line.split()) for line in str(error).splitlines())


def _open(paths: Sequence[Path]) -> list[_Subject]:
    """Open every variant; one that is broken is kept with its error. A wrong path is a wrong command."""
    if not paths:
        raise UsageError("no variant to validate", required="at least one")
    subjects = []
    for path in paths:
        if not path.exists():
            raise UsageError("no such variant", where=str(path), required="a .gguf file or a checkpoint folder")
        try:
            variant = open_variant(path)
            measured = measured_files(variant.files)
            subjects.append(_Subject(path, variant.label, measured, variant, list(variant.problems)))
        except UsageError:
            raise
        except StreamquantError as error:
            label = path.stem if path.suffix == ".gguf" else path.resolve().name
            subjects.append(_Subject(path, label, measured_files(weight_files(path))))
            subjects[-1].unreadable(error)
    files = Counter(subject.file.resolve() for subject in subjects)
    if twice := [path for path, count in files.items() if count > 1]:
        raise UsageError("a variant is given twice", found=str(twice[0]))
    counts = Counter(subject.label for subject in subjects)
    for subject in subjects:
        if counts[subject.label] > 1:
            subject.label = f"{subject.path.resolve().parent.name}/{subject.label}"
    return subjects


# Comparison


def _compare(state: _State, run: Callable[[list[Variant]], Comparison]) -> Comparison:
    """Run the comparison; again without a variant that turns out to be broken while it is read."""
    while True:
        readable = {subject.file: subject for subject in state.subjects if subject.variant is not None}
        try:
            found = run([subject.variant for subject in readable.values() if subject.variant is not None])
            break
        except UsageError:
            raise
        except StreamquantError as error:
            culprit = _culprit(state, str(error))
            if culprit is None:
                raise
            culprit.unreadable(error)
    for result in found.variants:
        subject = next(item for item in state.subjects if str(item.file) == result.model.path)
        # problems of the file are among the result's: those found while reading, and the differences, are added
        known = set(subject.problems)
        subject.problems += [problem for problem in result.problems if problem not in known]
    return found


def _culprit(state: _State, message: str) -> _Subject | None:
    """The variant that an error names: the longest of all paths that it names is one of its files."""
    owners: dict[str, _Subject | None] = {str(path): None for path in (state.original.path, *state.original.files)}
    for subject in state.subjects:
        if subject.variant is not None:
            owners |= {str(path): subject for path in (subject.variant.path, *subject.variant.files)}
    named = [path for path in owners if path in message]
    variants = [path for path in named if owners[path] is not None]
    # an error of a variant may name the original as what is required; one of the original names no variant
    return owners[max(variants, key=len)] if variants else None


# Tokens, chat, lints


def _check_tokenizers(state: _State, texts: dict[str, list[str]]) -> None:
    wanted = state.wants("tokens", "chat", "lints")
    if not wanted:
        return
    if state.original.kind == "gguf":
        for section in wanted:
            state.skip(section, "the original is a GGUF file: a checkpoint folder has the tokenizer to compare with")
        return
    if "chat" in wanted and not folder_templates(state.original.path):
        state.skip("chat", "the original has no chat template")
        wanted = tuple(section for section in wanted if section != "chat")
    total, done = len(state.subjects) + 1, 0
    state.progress("tokens and chat templates", done, total)
    with ExitStack() as stack:
        try:
            source = stack.enter_context(EngineProcess(state.original.path, tokenizer_only=True))
        except StreamquantError as error:
            for section in wanted:
                state.skip(section, f"the original's tokenizer cannot be loaded: {one_line(error)}")
            return
        state.versions["transformers"] = source.facts.version.removeprefix("transformers ")
        with _section(state, "lints", None):
            state.original_lints = tuple(lint_checkpoint(source)) if "lints" in wanted else None
        special = source.special_tokens()
        for subject in state.subjects:
            done += 1
            state.progress("tokens and chat templates", done, total)
            if subject.readable:
                _check_tokenizer(state, subject, source, special, texts, wanted)
            else:
                _skip_unreadable(state, subject, wanted)
    state.progress("tokens and chat templates", total, total)


def _check_tokenizer(
    state: _State,
    subject: _Subject,
    source: EngineProcess,
    special: list[tuple[int, str, bool]],
    texts: dict[str, list[str]],
    wanted: tuple[Section, ...],
) -> None:
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(EngineProcess(subject.file, tokenizer_only=True))
        except StreamquantError as error:
            _cannot_load(state, subject, error, wanted)
            return
        state.versions.setdefault(engine.facts.kind, engine.facts.version)
        if "tokens" in wanted:
            with _section(state, "tokens", subject):
                subject.tokens = compare_tokens(source, engine, special, texts)
                subject.problems += [Problem("tokens", "error", what) for what in subject.tokens.problems]
                subject.problems += _token_types(subject, special)
        if "chat" in wanted:
            with _section(state, "chat", subject):
                subject.chat = compare_chat(source, engine)
                subject.problems += [Problem("chat", "error", what) for what in subject.chat.problems]
        if "lints" in wanted:
            with _section(state, "lints", subject):
                gguf = subject.file.suffix == ".gguf"
                lints = lint_gguf(subject.file, source) if gguf else lint_checkpoint(engine)
                known = {lint.name for lint in state.original_lints or ()}
                subject.lints = tuple(lint for lint in lints if lint.name not in known)
                subject.problems += [_lint_problem(lint) for lint in subject.lints]


def _token_types(subject: _Subject, special: list[tuple[int, str, bool]]) -> list[Problem]:
    """One problem for all added tokens of another text or type."""
    found = check_token_types(subject.file, special) if subject.file.suffix == ".gguf" else ()
    if not found:
        return []
    shown = "; ".join(found[:NAMED]) + (f"; and {len(found) - NAMED} more" if len(found) > NAMED else "")
    return [Problem("token-types", "error", "added tokens of another text or type than the original's", found=shown)]


def _lint_problem(lint: Lint) -> Problem:
    what = f"{lint.found}: {lint.consequence}"
    return Problem(f"template:{lint.name}", lint.severity, what, required=lint.fix)


@contextmanager
def _section(state: _State, section: Section, subject: _Subject | None) -> Iterator[None]:
    """A section that fails is noted, with its reason."""
    try:
        yield
    except StreamquantError as error:
        state.skip(section, one_line(error), subject)


def _skip_unreadable(state: _State, subject: _Subject, sections: Sequence[Section]) -> None:
    for section in sections:
        state.skip(section, "the variant cannot be read", subject)


def _cannot_load(state: _State, subject: _Subject, error: StreamquantError, sections: Sequence[Section]) -> None:
    """An engine that refuses a file is a problem of the file; a package that is missing, or a time limit, is none."""
    for section in sections:
        state.skip(section, one_line(error), subject)
    if error.what == "the engine cannot load the model":
        subject.problems.append(Problem("engine", "error", "the engine refuses the file", found=one_line(error)))


# Engines and behaviour


def _check_engines(state: _State, ids: list[int]) -> None:
    """Load every variant in its engine: its probabilities against our forward pass, and its answers."""
    wanted = state.wants("engines", "behaviour")
    readable = [subject for subject in state.subjects if subject.readable]
    for subject in state.subjects:
        if not subject.readable:
            _skip_unreadable(state, subject, wanted)
    with ExitStack() as stack:
        references = _References(state, stack)
        for number, subject in enumerate(readable if wanted else ()):
            state.progress("engines", number, len(readable))
            _check_engine(state, subject, ids, wanted, references)
    state.progress("engines", len(readable), len(readable))


def _check_engine(
    state: _State, subject: _Subject, ids: list[int], wanted: tuple[Section, ...], references: "_References"
) -> None:
    variant = subject.variant
    assert variant is not None
    if (reason := _too_large(variant)) is not None:
        for section in wanted:
            state.skip(section, reason, subject)
        return
    context = min(ENGINE_CONTEXT, int(variant.config.get("max_position_embeddings") or ENGINE_CONTEXT))
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(EngineProcess(subject.file, context=context, threads=_threads()))
        except StreamquantError as error:
            _cannot_load(state, subject, error, wanted)
            return
        state.versions[engine.facts.kind] = engine.facts.version
        if "engines" in wanted:
            with _section(state, "engines", subject):
                prompts = _prompts(ids, context, state.job.lengths)
                logits = last_logits(variant, prompts, state.job.setting)
                subject.engine = engine_agreement(engine, prompts, logits)
                subject.problems += [Problem("engine", "error", what) for what in subject.engine.problems]
        if "behaviour" in wanted:
            with _section(state, "behaviour", subject):
                source = references.get(subject, context)
                subject.behaviour = compare_behaviour(source, engine, max_tokens=state.job.answer_tokens)
                subject.problems += [Problem("behaviour", "warning", what) for what in subject.behaviour.problems]


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    """Bytes that a program can have without swapping: what is free, and the page cache."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return free_memory("cpu")


def _too_large(variant: Variant) -> str | None:
    """Why a variant is not loaded as a whole, or None if it fits."""
    free = int(ROOM * _available_memory())
    if variant.nbytes <= free:
        return None
    return f"the engine loads the model as a whole: {variant.nbytes:,} bytes, and {free:,} are free"


def _prompts(ids: list[int], context: int, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of the lengths that fit into the context and the text."""
    room = min(context - 1, len(ids) // len(lengths))
    return prompts_from(ids, [length for length in lengths if length <= room])


def last_logits(variant: Variant, prompts: Sequence[Sequence[int]], setting: Setting) -> "NDArray[np.floating]":
    """float32[prompts, vocabulary] of the token after each prompt, by the layer-streamed pass.

    Short prompts are filled up to 128 tokens, long ones to the longest: attention is causal, so what comes later does
    not matter, and the weights are read twice at most.
    """
    import numpy as np
    import torch

    groups = [[at for at, prompt in enumerate(prompts) if (len(prompt) <= 128) is short] for short in (True, False)]
    lane = Lane(variant)
    rows: dict[int, torch.Tensor] = {}
    for members in filter(None, groups):
        width = max(len(prompts[at]) for at in members)
        tokens = np.zeros((len(members), width), np.int64)
        for row, at in enumerate(members):
            tokens[row, : len(prompts[at])] = prompts[at]
        run_layers([lane], tokens, setting)
        assert lane.hidden is not None
        for row, at in enumerate(members):
            rows[at] = lane.hidden[row, len(prompts[at]) - 1].clone()
    hidden = torch.stack([rows[at] for at in sorted(rows)])
    return Head(lane, setting).logits(hidden).cpu().numpy()  # type: ignore[no-any-return] # torch is not typed here


class _References:
    """The engines whose answers stand for the original's; each is loaded once and answers once.

    For a GGUF that is a variant without quantized tensors, if there is one: the same engine, so that what differs is
    the weights. Else transformers with the original.
    """

    def __init__(self, state: _State, stack: ExitStack) -> None:
        self._state, self._stack = state, stack
        self._loaded: dict[Path, _Remembering | StreamquantError] = {}

    def get(self, subject: _Subject, context: int) -> "_Remembering":
        """The reference for a variant. Raises StreamquantError if it cannot be loaded."""
        path = self._path(subject)
        if path not in self._loaded:
            self._loaded[path] = self._load(path, context)
        found = self._loaded[path]
        if isinstance(found, StreamquantError):
            raise found
        return found

    def _path(self, subject: _Subject) -> Path:
        plain = [
            other.file
            for other in self._state.subjects
            if other.variant is not None and other.variant.kind == "gguf" and other is not subject
            and {tensor.stored_as for tensor in other.variant.tensors.values()} <= {"BF16", "F16", "F32"}
        ]  # fmt: skip
        return plain[0] if plain and subject.file.suffix == ".gguf" else self._state.original.path

    def _load(self, path: Path, context: int) -> "_Remembering | StreamquantError":
        variant = open_variant(path)
        if (reason := _too_large(variant)) is not None:
            return StreamquantError(f"the original does not fit beside the variant: {reason}")
        try:
            engine = EngineProcess(path, context=context, threads=_threads())
        except StreamquantError as error:
            return error
        return _Remembering(self._stack.enter_context(engine))


class _Remembering:
    """An Engine that answers the same question once."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._answers: dict[tuple[tuple[tuple[int, ...], ...], int], list[Generation]] = {}

    @property
    def facts(self) -> EngineFacts:
        return self._engine.facts

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        return self._engine.tokenize(texts, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._engine.detokenize(ids)

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        return self._engine.apply_template(requests)

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        return self._engine.next_token_logprobs(prompts, top)

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        key = tuple(map(tuple, prompts)), max_tokens
        if key not in self._answers:
            self._answers[key] = self._engine.generate_greedy(prompts, max_tokens)
        return self._answers[key]


# The report


def _variant_report(subject: _Subject) -> VariantReport:
    return VariantReport(
        subject.label, str(subject.file), subject.files, tuple(subject.problems), subject.tokens, subject.chat,
        subject.lints, subject.engine, subject.behaviour,
    )  # fmt: skip


def _report(state: _State, comparison: Comparison) -> Report:
    variants = tuple(map(_variant_report, state.subjects))
    results = {result.model.path: result for result in comparison.variants}
    gates = [
        found
        for variant in variants
        for found in judge(state.job.gates, variant.label, measured_numbers(variant, results.get(variant.path)))
    ]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report(
        schema=SCHEMA,
        created=now,
        command=state.job.command,
        versions=_versions(state, comparison),
        machine=this_machine(),
        comparison=comparison,
        original_files=measured_files(state.original.files),
        variants=variants,
        original_lints=state.original_lints,
        not_run=tuple(state.not_run),
        gates=state.job.gates,
        gate_results=tuple(gates),
    )


def measured_numbers(variant: VariantReport, result: VariantResult | None) -> Measured:
    """What the gates are about (validate/gates.py): number by name, None where it was not measured."""
    chat = None if variant.chat is None else sum(item.cause == "file" for item in variant.chat.differences)
    numbers: dict[str, float | None] = {
        "errors": variant.errors,
        "token mismatches": None if variant.tokens is None else variant.tokens.different,
        "chat mismatches": chat,
    }
    if result is not None:
        numbers |= {
            "mean KLD": result.overall.kld.value,
            "99.9% KLD": result.overall.kld_percentiles.p99_9,
            "same top": result.overall.same_top.value,
            "PPL ratio": result.overall.ratio.value,
        }
    return numbers


def _versions(state: _State, comparison: Comparison) -> dict[str, str]:
    found = dict(comparison.versions) | state.versions
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))
