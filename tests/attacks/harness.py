"""What the attacks share: a small model, the command line in process and out of it, checksums of whole folders."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from streamquant.cli import app as command_line
from tests.synthetic import write_checkpoint

ROOT = Path(__file__).parents[2]
TO = ("--to", "gguf:Q8_0,Q4_0")
MEDIUM = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
MEDIUM_VOCABULARY = 12288


# Models


def write_tokenizer(folder: Path, **changes: Any) -> None:
    """A byte-level tokenizer with one merge: 257 tokens, GPT-2's pre-tokenizer."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    tokens = [*alphabet, "th"]
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": ["t h"]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))


def write_model(folder: Path, **options: Any) -> Path:
    """A synthetic checkpoint with that tokenizer, 0.4 MB by default; options of tests.synthetic.write_checkpoint."""
    write_checkpoint(folder, **options)
    write_tokenizer(folder)
    return folder


def write_medium_model(folder: Path) -> Path:
    """About 40 MB in 3 shards."""
    return write_model(folder, size=MEDIUM, vocab_size=MEDIUM_VOCABULARY, shards=3)


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def pack(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of any header: an object (as JSON) or bytes; `length` is what its prefix says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def unpack(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), raw[begin:]


def rewrite(path: Path, change: Mapping[str, Any]) -> None:
    """Change entries of a shard's header, whatever comes of it; None removes one."""
    header, data = unpack(path)
    merged = {key: value for key, value in {**header, **change}.items() if value is not None}
    path.write_bytes(pack(merged, data))


def edit_json(path: Path, **change: Any) -> None:
    """Set keys of a JSON object in a file; `...` removes one."""
    merged = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not ...}))


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file in place."""
    poke(path, offset, bytes([path.read_bytes()[offset] ^ 0x10]))


def entry(header: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The data offsets of a tensor."""
    start, stop = header[name]["data_offsets"]
    return start, stop


# Folders


def checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a write to a folder would change: names, modes, times, contents."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        stat = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, digest)
    return found


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Fails if anything was written to the folder."""
    before = state(folder)
    yield
    assert state(folder) == before, f"{folder} was written to"


def finished_files(out: Path) -> list[Path]:
    """The files of weights that have their final names."""
    return [path for path in out.rglob("*") if path.suffix in (".gguf", ".safetensors")] if out.exists() else []


def chunks_in_journal(out: Path) -> int:
    """How many chunks the journal of an unfinished run lists."""
    path = out / ".streamquant" / "journal.jsonl"
    try:
        return path.read_bytes().rpartition(b"\n")[0].count(b'{"chunk":')
    except FileNotFoundError:
        return 0


# The command line


_WAIT = re.compile(r"(; again in \d+ (s|min)|: no answer from \S+ for \d+ s)$")


@dataclass(frozen=True)
class Ran:
    """What a command gave back."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> None:
        """Fails unless the command gave one readable message with these words and this exit code."""
        assert "Traceback" not in self.err + self.out, self.err
        assert self.err.startswith("error: "), f"{self.code} {self.err!r} {self.out!r}"
        assert self.err.count("error: ") == 1, self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in: {self.err}"
        assert self.code == code, self.err
        assert len(self.err) < 5000, f"a message of {len(self.err)} characters"

    def without_waits(self) -> "Ran":
        """Without what it said of the Hub meanwhile: what failed for now and is tried again, or gives no answer."""
        lines = (line for line in self.err.splitlines(keepends=True) if not _WAIT.search(line))
        return replace(self, err="".join(lines))

    def done(self) -> "Ran":
        """Fails unless the command worked."""
        assert self.code == 0, self.err
        assert self.err == ""
        return self

    @property
    def resumed(self) -> int:
        """The number of chunks that the command says it found."""
        match = re.search(r"resumed: (\d+) of \d+ chunks", self.out)
        return int(match[1]) if match else 0


def run(*arguments: object) -> Ran:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    terminate = signal.getsignal(signal.SIGTERM)
    argv = ["streamquant", *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
            command_line.main()
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code
    finally:
        signal.signal(signal.SIGTERM, terminate)
    assert isinstance(code, int)
    return Ran(code, out.getvalue(), err.getvalue())


def start(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Begin the real command in a process of its own."""
    command = [sys.executable, "-P", "-m", "streamquant", *map(str, arguments)]
    options.setdefault("preexec_fn", _hear_interrupts)
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def _hear_interrupts() -> None:
    """A shell that runs the tests in the background makes them, and all that they start, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: "subprocess.Popen[str]") -> Ran:
    """Wait for a command."""
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


def run_process(*arguments: object, **options: Any) -> Ran:
    """The real command in a process of its own."""
    return finish(start(*arguments, **options))


_MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def run_measured(folder: Path, *arguments: object) -> tuple[Ran, int]:
    """The real command, and the most memory that it held, in bytes.

    A small process in between starts it: a child's peak counts from its parent's size.
    """
    peak = folder / "peak"
    command = [sys.executable, "-I", "-S", "-c", _MEASURE, peak, sys.executable, "-P", "-m", "streamquant"]
    ran = subprocess.run(
        [*map(str, command), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr), int(peak.read_text()) * 1024


# Many commands from one process that has imported everything: see tests/attacks/zygote.py


class Zygote:
    """Forks a process per command, in a tenth of the time, and with the faults that a test asks for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.attacks.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def start(self, *arguments: object, **faults: Any) -> "Forked":
        """Begin a command with faults of tests.attacks.zygote."""
        self._count += 1
        log = self._folder / f"run-{self._count}"
        argv = ["streamquant", *map(str, arguments)]
        return Forked(self, self.ask({"argv": argv, "log": str(log), "faults": faults}), log)

    def run(self, *arguments: object, **faults: Any) -> Ran:
        """A command with faults, to its end."""
        return self.start(*arguments, **faults).wait()

    def ask(self, request: object) -> int:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=30)


@dataclass(frozen=True)
class Forked:
    """A running command."""

    zygote: Zygote
    pid: int
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; it is not waited for yet, so its id is still its own."""
        os.kill(self.pid, number)

    def wait(self) -> Ran:
        """Wait for its end."""
        code = self.zygote.ask({"wait": self.pid})
        return Ran(code, self.log.with_suffix(".out").read_text(), self.log.with_suffix(".err").read_text())


def wait_for_chunks(out: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until the journal lists `count` chunks."""
    deadline = time.monotonic() + 60
    while chunks_in_journal(out) < count:
        assert process.poll() is None, "the command ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.001)
