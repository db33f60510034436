"""A process that has imported streamquant and forks a child per command; faults are put into the child, not the code.

Reads a JSON object a line: {"argv": [...], "log": path, "faults": {...}} answers the child's id, {"wait": id} its exit
code. A fault is the name and the argument of a function `fault_...` below.
"""

import errno
import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamquant.cli import app as command_line
from tests.attacks.harness import TO, run, write_model


def fault_set(values: dict[str, Any]) -> None:
    """Replace module attributes: {"streamquant.convert.plan.records.CHUNK_BYTES": 65536}."""
    for name, value in values.items():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)
        setattr(sys.modules[module], attribute, value)


def fault_environ(values: dict[str, str]) -> None:
    """Set variables of the environment."""
    os.environ.update(values)


def fault_slow(seconds: float) -> None:
    """Every pwrite takes its time."""
    _wrap("pwrite", lambda _count, *_arguments: time.sleep(seconds))


# What changes a file system, and in which order a crash can cut it.
CHANGES = ("open", "pwrite", "write", "fsync", "ftruncate", "truncate", "replace", "unlink", "mkdir", "rmdir")


def fault_die_at(number: int) -> None:
    """kill -9 at the n-th change of the file system, half done if it is a write."""
    changes = itertools.count(1)
    write = os.write
    pwrite = os.pwrite

    def die(_count: int, name: str, *arguments: Any) -> None:
        if next(changes) != number:
            return
        if name == "write":
            write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        elif name == "pwrite":
            pwrite(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    for name in CHANGES:
        _wrap(name, lambda count, *arguments, name=name: die(count, name, *arguments))


def fault_die_in_pwrite(number: int) -> None:
    """kill -9 at the n-th pwrite: no line of the journal is torn."""

    def die(count: int, *_arguments: Any) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    _wrap("pwrite", die)


def fault_die_around(where: list[str]) -> None:
    """["before" or "after", "PACKAGE.MODULE.CLASS.remove"]: kill -9 before or after the first call of a function."""
    when, path = where
    owner, _, name = path.rpartition(".")
    try:
        holder: Any = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, class_name = owner.rpartition(".")
        holder = getattr(importlib.import_module(module), class_name)
    original = getattr(holder, name)

    def wrapped(*arguments: Any, **keywords: Any) -> None:
        if when == "after":
            original(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    setattr(holder, name, wrapped)


def fault_count_changes(path: str) -> None:
    """Write the number of changes of the file system so far to a file, at each."""
    counts = itertools.count(1)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    pwrite = os.pwrite
    for name in CHANGES:
        _wrap(name, lambda *_arguments: pwrite(descriptor, f"{next(counts):9}".encode(), 0))


def fault_full_after(nbytes: int) -> None:
    """The disk is full after `nbytes` of weights: short write first, ENOSPC then."""
    left = [nbytes]
    pwrite = os.pwrite

    def limited(descriptor: int, data: Any, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data = memoryview(data)[: left[0]]
        left[0] -= len(data)
        return pwrite(descriptor, data, offset)

    os.pwrite = limited


def fault_fail(call: dict[str, Any]) -> None:
    """{"name": "fsync", "at": 3, "errno": 28}: the n-th call of a function of os fails, and all after it."""

    def fail(count: int, *_arguments: Any) -> None:
        if count >= call["at"]:
            raise OSError(call["errno"], os.strerror(call["errno"]))

    _wrap(call["name"], fail)


def fault_free_bytes(free: int) -> None:
    """What the disk says it has left."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _path: usage._replace(free=free)  # type: ignore[assignment]


def fault_user(number: int) -> None:
    """Another user, without root's rights."""
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)


_lock = threading.Lock()


def _wrap(name: str, before: Callable[..., object]) -> None:
    """Call `before(number of the call, *arguments)` ahead of every call of a function of os."""
    original = getattr(os, name)
    counts = itertools.count(1)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        with _lock:
            before(next(counts), *arguments)
        return original(*arguments, **keywords)

    setattr(os, name, wrapped)


def _child(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, suffix in ((1, ".out"), (2, ".err")):
        descriptor = os.open(request["log"] + suffix, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["argv"]
    code: object = 0
    try:
        for name, argument in request["faults"].items():
            globals()[f"fault_{name}"](argument)
        command_line.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # as the interpreter would end
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """Serve until the input ends."""
    with tempfile.TemporaryDirectory() as folder:  # load kernels and late imports once, not in every child
        model = write_model(Path(folder) / "Warm")
        run("convert", model, *TO, "--out", Path(folder) / "out", "--jobs", 1).done()
    for name in ("streamquant.hub.errors", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
        importlib.import_module(name)
    gc.freeze()
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                _child(request)
        os.write(answers, f"{answer}\n".encode())


if __name__ == "__main__":
    main()
