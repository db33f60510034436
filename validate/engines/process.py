"""An engine in a process of its own, behind the interface of validate/engines/engine.py."""

import contextlib
import glob
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from streamquant.quant.errors import UsageError
from streamquant.validate.engines.child import EngineChild, memory_limit
from streamquant.validate.engines.engine import (
    EngineFacts,
    FolderEngine,
    Generation,
    Kind,
    Rendered,
    TemplateRequest,
    TopLogprobs,
    engines_for,
    kind_of,
)
from streamquant.validate.engines.vocabulary_gguf import write_vocabulary_gguf

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How an engine loads a model."""

    context: int = 2048
    """Tokens of the longest prompt and answer."""
    threads: int | None = None
    """Threads of the engine; None: its own choice."""
    dtype: str | None = None
    """transformers and vLLM: "bfloat16", "float32"; None: as stored."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds until an engine that does not answer is given up."""

    load: float = 300.0
    """To start and to load tokenizer and chat template."""
    request: float = 600.0
    """For one request."""
    bytes_per_second: float = 50e6
    """Of weights, from a slow disk: what a whole model may take beside `load`."""


class EngineProcess:
    """The Engine of validate/engines/engine.py, served by a child process. A context manager.

    path             a .gguf file (of a split: the first), or a checkpoint folder
    kind             the engine; by default that of the file
    tokenizer_only   load tokenizer and chat template alone, in little time and memory whatever the model's size
                     (llama.cpp: a stand-in with the file's own tokenizer keys, see vocabulary_gguf.py)

    Raises UsageError if the engine's package is not installed or there is no such file, EngineError if the engine
    cannot load it.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: Kind | None = None,
        tokenizer_only: bool = False,
        options: LoadOptions | None = None,
        limits: TimeLimits | None = None,
    ) -> None:
        self.kind: Kind = kind or kind_of(path)
        self.path, self.limits = path, limits or TimeLimits()
        self._tokenizer_only, self._options = tokenizer_only, options or LoadOptions()
        self._resources = contextlib.ExitStack()
        try:
            self._model = self._stand_in(path) if tokenizer_only and self.kind == "llama.cpp" else path
            self._child = self._start()
        except BaseException:
            self.close()
            raise

    def _stand_in(self, path: Path) -> Path:
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="streamquant-"))
        return write_vocabulary_gguf(path, Path(folder) / "vocabulary.gguf")

    def _start(self) -> EngineChild:
        child = EngineChild(self.kind, self.path)
        try:
            loading = {
                "path": str(self._model),
                "tokenizer_only": self._tokenizer_only,
                "memory": memory_limit(tokenizer_only=self._tokenizer_only),
                **asdict(self._options),
            }
            size = 0 if self._tokenizer_only else sum(path.stat().st_size for path in _weights(self.path))
            found = child.ask("load", self.limits.load + size / self.limits.bytes_per_second, loading)
            try:
                self._facts = EngineFacts(**{**found, "model": str(self.path)})
            except TypeError:
                raise child.wrong_answer("load", f"{found!r:.120}") from None
        except BaseException:
            child.close()
            raise
        return child

    @property
    def ended(self) -> bool:
        """Whether the process is gone, and every request an error, until `restart`."""
        return self._child.ended is not None

    def restart(self) -> None:
        """Load again in a new process. Raises what the constructor raises."""
        self._child.close()
        self._child = self._start()

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself and the file."""
        return self._facts

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        """See Engine.tokenize."""
        arguments = {"texts": list(texts), "add_special": add_special, "parse_special": parse_special}
        return self._all("tokenize", len(texts), _ids, arguments)

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize."""
        return self._all("detokenize", len(ids), _text, {"ids": [list(run) for run in ids]})

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        """See Engine.apply_template."""
        asked = [asdict(request) for request in requests]
        return self._all("apply_template", len(requests), _rendered, {"requests": asked})

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        """See Engine.next_token_logprobs."""
        results = []
        for prompt in prompts:  # one by one: the time limit is for a prompt
            arguments = {"prompts": [list(map(int, prompt))], "top": top}
            results += self._all("next_token_logprobs", 1, _logprobs, arguments)
        return results

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        """See Engine.generate_greedy."""
        results = []
        for prompt in prompts:
            arguments = {"prompts": [list(map(int, prompt))], "max_tokens": max_tokens}
            results += self._all("generate_greedy", 1, _generation, arguments)
        return results

    def render(
        self,
        template: str,
        requests: Sequence[TemplateRequest],
        special: Mapping[str, str] | None = None,
        *,
        model: Path | None = None,
    ) -> list[Rendered]:
        """Render with another template in this engine; transformers and jinja only. ids are empty.

        special  bos_token, eos_token ... as the template sees them; by default the tokenizer's own (jinja has none)
        model    the file that the template is of: what it does to the engine is an error of that file
        """
        arguments = {
            "template": template,
            "requests": [asdict(request) for request in requests],
            "special": special and dict(special),
        }
        return self._all("render", len(requests), _rendered, arguments, model)

    def special_tokens(self) -> list[tuple[int, str, bool]]:
        """(id, text, flagged special) of every token that was added to the base vocabulary; transformers only."""
        return self._all("special_tokens", None, _special_token, {})

    def _all(
        self,
        method: str,
        count: int | None,
        read: Callable[[Any], T],
        arguments: dict[str, Any],
        model: Path | None = None,
    ) -> list[T]:
        """One request, and the list that it is answered with: `count` items (None: any number), each read by `read`."""
        found = self._child.ask(method, self.limits.request, arguments, model)
        if not isinstance(found, list) or (count is not None and len(found) != count):
            size = f"{len(found)} answers to {count} questions" if isinstance(found, list) else f"{found!r:.120}"
            raise self._child.wrong_answer(method, size, model)
        try:
            return [read(item) for item in found]
        except (TypeError, ValueError, KeyError) as error:
            raise self._child.wrong_answer(method, f"{type(error).__name__}: {error}"[:200], model) from error

    def close(self) -> None:
        """End the child. Safe to call again."""
        if hasattr(self, "_child"):
            self._child.close()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# What a child may answer: plain JSON -> records; TypeError, ValueError and KeyError for anything else.


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r:.60} is no token id")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _ids(found: Any) -> tuple[int, ...]:
    return tuple(_whole(number) for number in found)


def _rendered(found: Any) -> Rendered:
    error = found["error"]
    return Rendered(_text(found["text"]), _ids(found["ids"]), None if error is None else _text(error))


def _logprobs(found: Any) -> TopLogprobs:
    """Tokens that the engine rules out (minus infinity) are left out."""
    pairs = zip(_ids(found["ids"]), found["logprobs"], strict=True)
    kept = [(number, value) for number, value in pairs if value != -math.inf]
    wrong = [value for _, value in kept if not isinstance(value, int | float) or not math.isfinite(value)]
    if wrong or not kept:
        raise ValueError(f"{wrong[0]!r:.60} is no log-probability" if wrong else "no token has a probability")
    return TopLogprobs(tuple(number for number, _ in kept), tuple(float(value) for _, value in kept))


def _generation(found: Any) -> Generation:
    return Generation(_ids(found["ids"]), _text(found["text"]), found["stopped"] is True)


def _special_token(found: Any) -> tuple[int, str, bool]:
    number, text, flag = found
    return _whole(number), _text(text), flag is True


def open_engine(path: Path, wanted: FolderEngine | None, options: LoadOptions) -> EngineProcess:
    """Load a whole model in the first of its engines (`engines_for`) that is installed and usable on this machine.

    Raises what EngineProcess raises.
    """
    *others, last = engines_for(path, wanted)
    for kind in others:
        with contextlib.suppress(UsageError):
            return EngineProcess(path, kind=kind, options=options)
    return EngineProcess(path, kind=last, options=options)


def _weights(path: Path) -> list[Path]:
    """The files that an engine reads: all safetensors of a folder, all files of a split set."""
    if path.is_dir():
        return list(path.glob("*.safetensors"))
    stem, separator, count = path.name.rpartition("-of-")
    return list(path.parent.glob(f"{glob.escape(stem[:-5])}?????-of-{count}")) if separator else [path]
