"""The engines that stand for the original where a variant's answers are compared with its own."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from streamquant.files.machine import available_memory, usable_cores
from streamquant.model.variants.open import open_variant
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines.engine import EngineFacts, Generation, Rendered, TemplateRequest, TopLogprobs
from streamquant.validate.engines.process import EngineProcess, LoadOptions, open_engine
from streamquant.validate.run import Candidate, ValidationRun

FREE_SHARE = 0.9
"""Share of the free memory that a model may fill in its engine."""


def too_large(variant: Variant) -> str | None:
    """Why a variant is not loaded as a whole, or None if it fits."""
    free = int(FREE_SHARE * available_memory())
    if variant.nbytes <= free:
        return None
    return f"the engine loads the model as a whole: {variant.nbytes:,} bytes, and {free:,} are free"


class CachedEngine:
    """An Engine that answers the same question once."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._answers: dict[tuple[tuple[tuple[int, ...], ...], int], list[Generation]] = {}

    @property
    def facts(self) -> EngineFacts:
        """See Engine.facts."""
        return self._engine.facts

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        """See Engine.tokenize."""
        return self._engine.tokenize(texts, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize."""
        return self._engine.detokenize(ids)

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        """See Engine.apply_template."""
        return self._engine.apply_template(requests)

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        """See Engine.next_token_logprobs."""
        return self._engine.next_token_logprobs(prompts, top)

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        """See Engine.generate_greedy."""
        key = tuple(map(tuple, prompts)), max_tokens
        if key not in self._answers:
            self._answers[key] = self._engine.generate_greedy(prompts, max_tokens)
        return self._answers[key]


class ReferenceEngines:
    """The engines whose answers stand for the original's; each is loaded once and answers once.

    For a GGUF that is a variant without quantized tensors, if there is one: the same engine, so that what differs is
    the weights. Else the original itself, in the engine that runs folders.
    """

    def __init__(self, run: ValidationRun, stack: ExitStack) -> None:
        self._run, self._stack = run, stack
        self._loaded: dict[Path, CachedEngine | StreamquantError] = {}

    def get(self, candidate: Candidate, context: int) -> CachedEngine:
        """The reference for a variant. Raises StreamquantError if it cannot be loaded."""
        path = self._path(candidate)
        if path not in self._loaded:
            self._loaded[path] = self._load(path, context)
        found = self._loaded[path]
        if isinstance(found, StreamquantError):
            raise found
        return found

    def _path(self, candidate: Candidate) -> Path:
        plain = [
            other.file
            for other in self._run.candidates
            if other.variant is not None and not other.variant.is_folder and other is not candidate
            and {tensor.stored_as for tensor in other.variant.tensors.values()} <= {"BF16", "F16", "F32"}
        ]  # fmt: skip
        return plain[0] if plain and candidate.file.suffix == ".gguf" else self._run.original.path

    def _load(self, path: Path, context: int) -> CachedEngine | StreamquantError:
        variant = open_variant(path)
        if (reason := too_large(variant)) is not None:
            return StreamquantError(f"the original does not fit beside the variant: {reason}")
        try:
            loading = LoadOptions(context=context, threads=usable_cores())
            engine = open_engine(path, self._run.options.engine, loading)
        except StreamquantError as error:
            return error
        return CachedEngine(self._stack.enter_context(engine))
