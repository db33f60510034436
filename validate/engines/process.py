"""An engine in a process of its own: whatever happens there, a broken file or an endless template, ends as an error."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.engine import (
    EngineFacts,
    EngineLoadError,
    Generation,
    Kind,
    Rendered,
    TemplateRequest,
    TopLogprobs,
    kind_of,
)
from streamquant.validate.engines.vocabulary_gguf import write_vocabulary_gguf
from streamquant.validate.engines.worker import ADAPTERS


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

    load: float = 1800.0
    """For the model: hundreds of GB from a slow disk."""
    request: float = 600.0
    """For one request."""


class EngineProcess:
    """The Engine of validate/engines/engine.py, served by a child process. A context manager.

    path             a .gguf file (of a split: the first), or a checkpoint folder
    kind             the engine; by default that of the file
    tokenizer_only   load tokenizer and chat template alone, in little time and memory whatever the model's size
                     (llama.cpp: a stand-in with the file's own tokenizer keys, see vocabulary_gguf.py)

    Raises UsageError if the engine's package is not installed or there is no such file, StreamquantError if the engine
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
        self._resources = contextlib.ExitStack()
        self._errors = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
        self._buffer = b""
        try:
            model = self._stand_in(path) if tokenizer_only and self.kind == "llama.cpp" else path
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "streamquant.validate.engines.worker", self.kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
            )
            self._resources.callback(self._end)
            loading = {"tokenizer_only": tokenizer_only, **asdict(options or LoadOptions())}
            found = self.call("load", self.limits.load, path=str(model), **loading)
            self._facts = EngineFacts(**{**found, "model": str(path)})
        except BaseException:
            self.close()
            raise

    def _stand_in(self, path: Path) -> Path:
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="streamquant-"))
        return write_vocabulary_gguf(path, Path(folder) / "vocabulary.gguf")

    @property
    def facts(self) -> EngineFacts:
        """What the engine says of itself and the file."""
        return self._facts

    def tokenize(self, texts: Sequence[str], *, add_special: bool, parse_special: bool) -> list[tuple[int, ...]]:
        """See Engine.tokenize."""
        found = self.call("tokenize", texts=list(texts), add_special=add_special, parse_special=parse_special)
        return [tuple(ids) for ids in found]

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize."""
        return [str(text) for text in self.call("detokenize", ids=[list(run) for run in ids])]

    def apply_template(self, requests: Sequence[TemplateRequest]) -> list[Rendered]:
        """See Engine.apply_template."""
        found = self.call("apply_template", requests=[asdict(request) for request in requests])
        return [_rendered(item) for item in found]

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        """See Engine.next_token_logprobs."""
        results = []
        for prompt in prompts:  # one by one: the time limit is for a prompt
            (found,) = self.call("next_token_logprobs", prompts=[list(map(int, prompt))], top=top)
            results.append(TopLogprobs(tuple(found["ids"]), tuple(found["logprobs"])))
        return results

    def generate_greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        """See Engine.generate_greedy."""
        results = []
        for prompt in prompts:
            (found,) = self.call("generate_greedy", prompts=[list(map(int, prompt))], max_tokens=max_tokens)
            results.append(Generation(tuple(found["ids"]), found["text"], found["stopped"]))
        return results

    def render(
        self, template: str, requests: Sequence[TemplateRequest], special: Mapping[str, str] | None = None
    ) -> list[Rendered]:
        """Render with another template in this engine; transformers and jinja only. ids are empty.

        special  bos_token, eos_token ... as the template sees them; by default the tokenizer's own (jinja has none)
        """
        asked = [asdict(request) for request in requests]
        found = self.call("render", template=template, requests=asked, special=special and dict(special))
        return [_rendered(item) for item in found]

    def special_tokens(self) -> list[tuple[int, str, bool]]:
        """(id, text, flagged special) of every token that was added to the base vocabulary; transformers only."""
        return [(number, text, flag) for number, text, flag in self.call("special_tokens")]

    def call(self, method: str, seconds: float | None = None, /, **arguments: Any) -> Any:
        """One request to the child, and its result. Raises StreamquantError if there is none."""
        seconds = self.limits.request if seconds is None else seconds
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died(method) from None
        answer = json.loads(self._read_line(method, seconds))
        if "missing" in answer:
            raise self._missing(answer["missing"])
        if "error" in answer:
            where, found = f"{self.kind}, {self.path}", answer["error"]
            if method == "load":
                raise EngineLoadError("the engine cannot load the model", where=where, found=found, hint=self._said())
            raise StreamquantError(f"the engine failed in {method}", where=where, found=found, hint=self._said())
        return answer["result"]

    def _read_line(self, method: str, seconds: float) -> bytes:
        assert self._child.stdout is not None
        limit = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            parts = [self._buffer]
            while b"\n" not in parts[-1]:
                if not selector.select(max(0.0, limit - time.monotonic())):
                    self.close()
                    raise StreamquantError(
                        f"the engine did not answer {method} in time",
                        where=f"{self.kind}, {self.path}",
                        found=f"no answer after {seconds:.0f} s",
                        hint="give a longer time limit, or look for an endless loop in the chat template",
                    )
                data = os.read(self._child.stdout.fileno(), 1 << 20)
                if not data:
                    raise self._died(method)
                parts.append(data)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line

    def _missing(self, module: str) -> StreamquantError:
        package = ADAPTERS[self.kind][2]
        return UsageError(
            f"the engine {self.kind} is not installed",
            where=str(self.path),
            found=f"no module {module!r}",
            required=f"the Python package {package}",
            hint=f"pip install {package}",
        )

    def _died(self, method: str) -> StreamquantError:
        code = self._child.wait(10)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return StreamquantError(
            f"the engine ended during {method}", where=f"{self.kind}, {self.path}", found=how, hint=self._said()
        )

    def _said(self) -> str | None:
        """The last lines that the child wrote to standard error, as a hint."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        told = [line for line in lines if "rror" in line or "ailed" in line or "ASSERT" in line] or lines
        return "it said: " + " / ".join(line.strip() for line in told[-3:])[:600] if told else None

    def _end(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def close(self) -> None:
        """End the child. Safe to call again."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rendered(found: Mapping[str, Any]) -> Rendered:
    return Rendered(found["text"], tuple(found["ids"]), found["error"])


def _environment() -> dict[str, str]:
    """The parent's, with this package on the path and no way to a model hub."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
