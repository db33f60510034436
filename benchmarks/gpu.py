"""Every GPU encoder: Gweights/s, the share of the copy bandwidth that it reaches, and whether its bytes are the CPU's.

    python -m benchmarks.gpu [--rows 8192] [--seconds 1] [--json FILE]

float32[rows, 8192] in GPU memory to bytes in GPU memory, after a first call that compiles. The share is that of the
bytes an encoder has to move, float32 in and its own bytes out, at the bandwidth of a copy within GPU memory in the
same run.
The last line is what a conversion can reach: BF16 from pinned memory to the GPU and back, which is what the bus takes.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamquant.quant import gpu
from streamquant.quant.format import NO_OVERFLOW, Importance, Rows
from streamquant.quant.formats import FORMATS

COLUMNS = 8192
CHECKED_ROWS = 64
"""Rows whose bytes are compared with the CPU's."""


@dataclass(frozen=True, slots=True)
class Result:
    """One encoder."""

    name: str
    importance: bool
    first_call: float
    """Seconds, compilation included where it is not cached."""
    weights_per_second: float
    share_of_copy: float
    same_bytes: bool


def main() -> int:
    """Measure and print a table; 1 if bytes differ, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each encoder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    missing = gpu.missing()
    if missing is not None:
        print(f"no GPU to measure on: {missing}. Nothing was measured.", file=sys.stderr)
        return 2
    import torch

    device = torch.cuda.get_device_name()
    rng = np.random.default_rng(0)
    host = (0.02 * rng.standard_normal((arguments.rows, COLUMNS), np.float32)).astype(np.float32)
    importance = rng.random(COLUMNS, np.float32) + np.float32(0.01)
    rows = torch.tensor(host, device="cuda")
    copy = _copy_bandwidth(rows, arguments.seconds)
    print(f"{device}, torch {torch.__version__}, float32[{arguments.rows}, {COLUMNS}]; copy {copy / 1e9:.0f} GB/s")
    print(f"{'':24} {'Gweights/s':>10} {'of copy':>8} {'first call':>10}  same bytes")
    results = []
    for name in sorted(gpu.ENCODED):
        for weights in (None, importance) if FORMATS[name].uses_importance else (None,):
            result = _measure(name, rows, host, weights, copy, arguments.seconds)
            results.append(result)
            title = f"{name} {'with importance' if result.importance else ''}"
            print(
                f"{title:24} {result.weights_per_second / 1e9:10.2f} {result.share_of_copy:8.0%} "
                f"{result.first_call:9.1f}s  {'yes' if result.same_bytes else 'NO'}",
                flush=True,
            )
    bus = _bus_bandwidth(arguments.seconds)
    print(f"from and to pinned memory at once: {bus / 1e9:.1f} GB/s each way, {bus / 2e9:.1f} Gweights/s of BF16")
    if arguments.json is not None:
        record = {"device": device, "copy": copy, "bus": bus, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(result.same_bytes for result in results) else 1


def _measure(name: str, rows: Any, host: Rows, importance: Importance | None, copy: float, seconds: float) -> Result:
    import torch

    parts = tuple(torch.tensor(part, device="cuda") for part in FORMATS[name].allocate(*host.shape))
    overflow = torch.tensor([NO_OVERFLOW], dtype=torch.int32, device="cuda")
    weights = None if importance is None else torch.tensor(importance, device="cuda")

    def encode() -> None:
        gpu.encode(name, rows, parts, overflow, weights)

    start = time.perf_counter()
    encode()
    torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    elapsed = _seconds_a_call(encode, seconds)
    expected = FORMATS[name].encode(host[:CHECKED_ROWS], importance)
    same = all(
        np.array_equal(part[: len(there)].cpu().numpy(), there) for part, there in zip(parts, expected, strict=True)
    )
    moved = host.nbytes + sum(part.numel() for part in parts)
    return Result(
        name,
        importance is not None,
        first_call,
        host.size / elapsed,
        moved / elapsed / copy,
        same and overflow.item() == NO_OVERFLOW,
    )


def _seconds_a_call(function: Any, seconds: float) -> float:
    """The best of runs of calls that together take about `seconds`, by the GPU's own clock."""
    import torch

    best, spent = float("inf"), 0.0
    while spent < seconds:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(stop) / 1e3
        best, spent = min(best, elapsed), spent + max(elapsed, 1e-4)
    return best


def _copy_bandwidth(rows: Any, seconds: float) -> float:
    """Bytes read and written a second by a copy within GPU memory."""
    import torch

    other = torch.empty_like(rows)
    nbytes: int = 2 * rows.numel() * 4
    return nbytes / _seconds_a_call(lambda: other.copy_(rows), seconds)


def _bus_bandwidth(seconds: float) -> float:
    """Bytes a second in each direction, with both directions busy."""
    import torch

    size = 256 * 2**20
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    devices = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both() -> None:
        current = torch.cuda.current_stream()
        for stream in streams:
            stream.wait_stream(current)
        with torch.cuda.stream(streams[0]):
            devices[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(devices[1], non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    return size / _seconds_a_call(both, seconds)


if __name__ == "__main__":
    sys.exit(main())
