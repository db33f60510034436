"""Where the CPU seconds of one conversion go: `python -m benchmarks.cpu_profile REPORT convert ...`.

A thread looks at every other thread's Python stack and CPU clock a few hundred times a second, and books the CPU time
since its last look on the innermost function of this repository: so native code (kernels, hashes, reads, writes) counts
for the line that called it, and waiting counts for nothing. Imports and Numba's loading of kernels are booked as such.
"""

import gc
import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).resolve().parents[1])
INTERVAL = 0.003
IMPORTS, LOADING, OTHER = "imports", "Numba: load or compile kernels", "other"


class Sampler(threading.Thread):
    """Books CPU seconds by function until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="sampler")
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last: dict[int, float] = {}
        self._done = threading.Event()

    def run(self) -> None:
        """Look until it is stopped."""
        while not self._done.wait(INTERVAL):
            self.look()

    def look(self) -> None:
        """Book the CPU time of every thread since the last look."""
        for ident, frame in sys._current_frames().items():
            if ident == threading.get_ident():
                continue
            try:
                now = time.clock_gettime(time.pthread_getcpuclockid(ident))
            except OSError:  # the thread has just ended
                continue
            spent = now - self._last.get(ident, 0.0)
            self._last[ident] = now
            if spent > 0:
                self.seconds[place(frame)] += spent

    def stop(self) -> None:
        """Stop looking."""
        self._done.set()
        self.join()


def place(frame: FrameType | None) -> str:
    """The innermost function of this repository on a stack, or what it is waiting for."""
    ours = ""
    importing = loading = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "/.venv/" not in file and "benchmarks" not in file:
            ours = ours or f"{Path(file).relative_to(ROOT)} {frame.f_code.co_qualname}"
        importing = importing or (file.startswith("<frozen importlib") and not ours)
        loading = loading or "/numba/core/dispatcher.py" in file
        frame = frame.f_back
    if importing:
        return IMPORTS
    return LOADING if loading and ours else ours or OTHER


def main() -> None:
    """Profile the command line in this process."""
    report = Path(sys.argv[1])
    sampler = Sampler()
    gc_seconds, started = [0.0], [0.0]

    def collecting(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            started[0] = time.perf_counter()
        else:
            gc_seconds[0] += time.perf_counter() - started[0]

    gc.callbacks.append(collecting)
    sampler.start()
    start = time.perf_counter()
    from streamquant.cli import app as command_line

    imported = time.perf_counter() - start
    sys.argv = ["streamquant", *sys.argv[2:]]
    try:
        command_line.main()
    except SystemExit as exit_:
        if exit_.code:
            raise
    wall = time.perf_counter() - start
    sampler.stop()
    result = {"wall": wall, "import": imported, "garbage": gc_seconds[0], "seconds": dict(sampler.seconds)}
    report.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
