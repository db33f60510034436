"""Weights per second and core of every encoder, against ggml's own (ggml_quantize_chunk in the wheel xllamacpp).

`python -m benchmarks.kernels REPORT SECONDS` writes JSON. One thread, CPU seconds of that thread, in turns, best of as
many as fit into SECONDS for each encoder.
"""

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from streamquant.quant.formats import FORMATS

SHAPE = (1024, 4096)
LEAST_TURNS = 5


def ggml_library() -> ctypes.CDLL | None:
    """The extension module of xllamacpp, which exports ggml; None if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def weights() -> NDArray[np.float32]:
    """float32 of SHAPE, drawn as the synthetic checkpoints are, with bfloat16's precision."""
    rows = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    rows *= np.float32(0.02)
    rows.view(np.uint32)[...] &= np.uint32(0xFFFF0000)
    return rows


def seconds_of(call: Callable[[], object]) -> float:
    """CPU seconds of this thread that one call takes."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def importances() -> NDArray[np.float32]:
    """float32 for each column of SHAPE: squares, as mean square activations are."""
    return np.square(np.random.default_rng(1).standard_normal(SHAPE[1], np.float32))


def compare(
    name: str,
    rows: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
    library: ctypes.CDLL | None,
    budget: float,
) -> dict[str, object]:
    """Seconds of one encoder and of ggml's for the same array, and whether the bytes agree."""
    format_ = FORMATS[name]
    out = format_.allocate(*rows.shape)
    ours: Callable[[], object] = lambda: format_.encode_into(rows, out, importance)  # noqa: E731
    theirs: Callable[[], object] | None = None
    reference = np.empty_like(out[0])
    kind = getattr(gguf.GGMLQuantizationType, name, None)
    if library is not None and kind is not None:
        columns = None if importance is None else importance.ctypes.data
        theirs = lambda: library.ggml_quantize_chunk(  # noqa: E731
            int(kind), rows.ctypes.data, reference.ctypes.data, 0, *rows.shape, columns
        )
    ours(), theirs and theirs()
    times: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + budget
    while time.perf_counter() < deadline or len(times[0]) < LEAST_TURNS:
        times[0].append(seconds_of(ours))
        if theirs is not None:
            times[1].append(seconds_of(theirs))
    return {
        "name": name if importance is None else f"{name}, importance",
        "ours": times[0],
        "ggml": times[1],
        "same": bool(np.array_equal(out[0], reference)) if theirs is not None else None,
    }


def main() -> None:
    """Measure every format of the table."""
    report, budget = Path(sys.argv[1]), float(sys.argv[2])
    rows, library = weights(), ggml_library()
    # Formats of F16 and F32 sources have the kernels of BF16 ones.
    names = [name for name, format_ in FORMATS.items() if format_.source_dtype in (None, "BF16")]
    jobs = [(name, None) for name in names] + [(name, importances()) for name in names if FORMATS[name].uses_importance]
    results = [compare(name, rows, importance, library, budget) for name, importance in jobs]
    report.write_text(json.dumps({"weights": rows.size, "results": results}))


if __name__ == "__main__":
    main()
