"""The process that an engine runs in: requests and answers on its pipes, its limits, and every way in which it can end.

Whatever happens there is an EngineError here: a broken file, an endless template, a crash, a hang, noise on the pipe.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from streamquant.files.machine import available_memory
from streamquant.quant.errors import UsageError
from streamquant.validate.engines.engine import EngineError, EngineLoadError, Kind
from streamquant.validate.engines.worker import ADAPTERS

TEMPLATE_MEMORY = 8 << 30
"""Bytes of data that a process without the model's weights may have: a template can ask for strings of any length."""
LONGEST_ANSWER = 1 << 28
"""Bytes of one answer: the log-probabilities of a whole vocabulary take some 10 MB."""


class EngineChild:
    """One engine in one process, which serves one request after the other.

    kind   the engine
    model  the file or folder that it is made for; errors carry it
    """

    def __init__(self, kind: Kind, model: Path) -> None:
        self.kind, self.model = kind, model
        self.ended: EngineError | None = None
        """Why there will be no more answers."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                command(kind),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=_environment(),
                bufsize=0,
            )
        except BaseException:
            self._errors.close()
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, method: str, seconds: float, arguments: dict[str, Any], model: Path | None = None) -> Any:
        """One request, and its result within `seconds`; `model`: what an error is a fault of, if not the engine's.

        Raises EngineError if there is no result, and again for every request after the one that ended the engine;
        UsageError if a package is missing.
        """
        if self.ended is not None:
            raise self.ended
        model, limit = model or self.model, time.monotonic() + seconds
        try:
            self._send(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n", limit)
            line = self._receive(limit)
        except TimeoutError:
            self._end(
                EngineError(
                    f"the engine did not answer {method} in time",
                    model=model,
                    where=self._where(model),
                    found=f"no answer after {seconds:.0f} s",
                    hint="look for an endless loop in the chat template; or the machine is too slow or busy",
                )
            )
        except _TooLongError:
            self._end(self._senseless(method, model, f"more than {LONGEST_ANSWER:,} bytes"))
        if line is None:
            self._end(self._died(method, model))
        return self._result(method, model, line)

    def _where(self, model: Path) -> str:
        return f"{self.kind}, {model}"

    def _send(self, request: bytes, limit: float) -> None:
        """Write the request. Raises TimeoutError if nobody reads it; a broken pipe shows when the answer is read."""
        rest = memoryview(request)
        with selectors.DefaultSelector() as selector, contextlib.suppress(BrokenPipeError):
            selector.register(self._requests, selectors.EVENT_WRITE)
            while rest:
                if not selector.select(max(0.0, limit - time.monotonic())):
                    raise TimeoutError
                rest = rest[self._requests.write(rest) or 0 :]

    def _receive(self, limit: float) -> bytes | None:
        """The next line, or None if the pipe ends first. Raises TimeoutError, _TooLongError."""
        parts, size = [self._buffer], len(self._buffer)
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in parts[-1]:
                if not selector.select(max(0.0, limit - time.monotonic())):
                    raise TimeoutError
                data = os.read(self._answers.fileno(), 1 << 20)
                if not data:
                    return None
                parts.append(data)
                size += len(data)
                if size > LONGEST_ANSWER:
                    raise _TooLongError
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line

    def _result(self, method: str, model: Path, line: bytes) -> Any:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or len(answer.keys() & {"result", "error", "missing"}) != 1:
            self._end(self._senseless(method, model, f"{line[:120]!r}"))
        if "missing" in answer:
            raise self._missing(str(answer["missing"]), answer.get("why"))
        if "error" in answer:
            where, found, hint = self._where(model), str(answer["error"]), self._said()
            if method == "load":
                self._end(
                    EngineLoadError(
                        "the engine cannot load the model", model=model, where=where, found=found, hint=hint
                    )
                )
            raise EngineError(f"the engine failed in {method}", model=model, where=where, found=found, hint=hint)
        return answer["result"]

    def _missing(self, module: str, why: object) -> UsageError:
        package = ADAPTERS[self.kind][2]
        return UsageError(
            f"the engine {self.kind} is not installed",
            where=str(self.model),
            found=f"no module {module!r}" if why is None else str(why),
            required=f"the Python package {package}",
            hint=f"pip install {package if module.partition('.')[0] == package else module}",
        )

    def _died(self, method: str, model: Path) -> EngineError:
        try:
            code = self._process.wait(3)
        except subprocess.TimeoutExpired:
            how, hint = "it closed its pipe and runs on", self._said()
        else:
            how, hint = f"exit code {code}", self._said()
            if code < 0:
                name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
                how = f"signal {name}" + (", as of a machine without free memory" if name == "SIGKILL" else "")
        return EngineError(
            f"the engine ended during {method}", model=model, where=self._where(model), found=how, hint=hint
        )

    def _senseless(self, method: str, model: Path, found: str) -> EngineError:
        return EngineError(
            f"the engine's answer to {method} makes no sense",
            model=model,
            where=self._where(model),
            found=found,
            hint=self._said(),
        )

    def wrong_answer(self, method: str, found: str, model: Path | None = None) -> EngineError:
        """The error of an answer that is no answer to the request."""
        return self._senseless(method, model or self.model, found)

    def _said(self) -> str | None:
        """The last lines that the child wrote to standard error, as a hint."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        told = [line for line in lines if "rror" in line or "ailed" in line or "ASSERT" in line] or lines
        return "it said: " + " / ".join(line.strip() for line in told[-3:])[:600] if told else None

    def _end(self, error: EngineError) -> NoReturn:
        self.ended = error
        self.close()
        raise error from None

    def close(self) -> None:
        """End the process. Safe to call again."""
        if self._errors.closed:
            return
        if self.ended is None:
            self.ended = EngineError("the engine was closed", model=self.model, where=self._where(self.model))
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._errors.close()


def command(kind: Kind) -> list[str]:
    """The command line of an engine's process."""
    return [sys.executable, "-P", "-m", "streamquant.validate.engines.worker", kind]


class _TooLongError(Exception):
    """A line that does not end."""


def memory_limit(*, tokenizer_only: bool) -> int:
    """Bytes of data that an engine may have: what is free, so that the system ends no other process for its sake."""
    return TEMPLATE_MEMORY if tokenizer_only else max(TEMPLATE_MEMORY, available_memory())


def _environment() -> dict[str, str]:
    """The parent's, with this package on the path and no way to a model hub."""
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
