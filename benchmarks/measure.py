"""Run commands in fresh processes and measure them: wall time, CPU time, resident memory of the whole process tree."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.02
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to measure; `outputs` are what it writes, removed before and after each run."""

    name: str
    command: Sequence[str]
    outputs: Sequence[Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    repeats: int | None = None
    """At most so many runs, where a full number would take too long."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one command."""

    wall: float
    """Seconds from start to exit."""
    cpu: float
    """User and system seconds of the process and its children."""
    resident: int
    """Peak of the resident bytes, anonymous and file, summed over the process tree; sampled."""
    anonymous: int
    """The anonymous part of `resident` at that moment."""
    largest: int
    """Peak of the largest single process as the kernel keeps it (VmHWM). Not ru_maxrss: after a fork that starts with
    the size of this process, not of the command."""
    written: int
    """Bytes of all outputs."""
    others: float
    """Share of all cores that other processes took meanwhile, 0 to 1."""


class _Watcher(threading.Thread):
    """Sums the resident memory of a process and its descendants every few milliseconds; keeps the peak."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._done = pid, threading.Event()
        self.peak, self.anonymous, self.largest = 0, 0, 0

    def run(self) -> None:
        """Look until it is stopped."""
        while not self._done.wait(SAMPLE_SECONDS):
            sizes = [_memory(pid) for pid in _tree(self._pid)]
            total = sum(size["VmRSS"] for size in sizes)
            self.largest = max([self.largest, *(size["VmHWM"] for size in sizes)])
            if total > self.peak:
                self.peak, self.anonymous = total, sum(size["RssAnon"] for size in sizes)

    def stop(self) -> None:
        """Stop looking."""
        self._done.set()
        self.join()


def _tree(root: int) -> list[int]:
    """The process and all its descendants (proc_pid_task_children(5))."""
    found = [root]
    for pid in found:
        try:
            tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - names are all that is wanted, 50 times a second
            for task in tasks:
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _memory(pid: int) -> dict[str, int]:
    """Resident bytes, their peak, the anonymous ones (proc_pid_status(5)); zeros for a process that has ended."""
    found = dict.fromkeys(("VmRSS", "VmHWM", "RssAnon"), 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for key, _, value in (line.partition(":") for line in lines):
        if key in found:
            found[key] = int(value.split()[0]) * 1024
    return found


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine took so far (proc_stat(5): user nice system idle iowait ...)."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run(contender: Contender, log: Path) -> Sample:
    """Run a command once. Raises RuntimeError with the end of its output if it fails."""
    remove(contender.outputs)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **contender.environment}
    busy = _busy_seconds()
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(
            contender.command,
            cwd=log.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        watcher = _Watcher(process.pid)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
        watcher.stop()
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, _busy_seconds() - busy - cpu) / (wall * CORES)
    if process.returncode != 0:
        raise RuntimeError(f"{contender.name} failed ({process.returncode}):\n{log.read_text()[-3000:]}")
    written = sum(nbytes(path) for path in contender.outputs)
    remove(contender.outputs)
    return Sample(wall, cpu, watcher.peak, watcher.anonymous, watcher.largest, written, others)


def nbytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(paths: Sequence[Path]) -> None:
    """Remove files and folders that exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def warm(folder: Path) -> None:
    """Read every file, so that all contenders find the source in the page cache."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


class Results:
    """The runs of some contenders, taken in turns: A B C A B C ..."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        self.samples = samples

    def best(self, name: str) -> Sample:
        """The run with the shortest wall time."""
        return min(self.samples[name], key=lambda sample: sample.wall)

    def wall(self, name: str) -> float:
        """Seconds of the best run."""
        return self.best(name).wall

    def cpu(self, name: str) -> float:
        """CPU seconds of the run that took the fewest."""
        return min(sample.cpu for sample in self.samples[name])

    def resident(self, name: str) -> int:
        """The largest peak of all runs."""
        return max(max(sample.resident, sample.largest) for sample in self.samples[name])

    def longest(self, name: str) -> float:
        """Seconds of the slowest run."""
        return max(sample.wall for sample in self.samples[name])

    def spread(self, name: str) -> str:
        """Shortest to longest wall time."""
        return f"{self.wall(name):.1f} to {self.longest(name):.1f}"

    def ratios(self, name: str, base: str) -> list[float]:
        """Wall time of `name` over that of `base`, round by round."""
        pairs = zip(self.samples[name], self.samples[base], strict=False)
        return [a.wall / b.wall for a, b in pairs]

    @property
    def others(self) -> float:
        """Mean share of the cores that processes outside the measurement took."""
        runs = [sample for samples in self.samples.values() for sample in samples]
        return sum(s.others * s.wall for s in runs) / sum(s.wall for s in runs)


def take_turns(
    contenders: Sequence[Contender], repeats: int, log: Path, progress: Callable[[str], None] = print
) -> Results:
    """Run every contender `repeats` times, interleaved, and keep all samples."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for number in range(repeats):
        for contender in contenders:
            if number < (contender.repeats or repeats):
                sample = run(contender, log)
                samples[contender.name].append(sample)
                progress(
                    f"  {contender.name}: {sample.wall:.2f} s, {sample.cpu:.2f} CPU s, "
                    f"{sample.resident / 2**20:.0f} MiB (others took {sample.others:.0%} of the cores)"
                )
                sys.stdout.flush()
    return Results(samples)
