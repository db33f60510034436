"""What the tests of number formats compare with, and what they feed to them.

`ggml_encode` is ggml's own quantizer: `ggml_quantize_chunk`, exported by the extension module inside the PyPI wheel
xllamacpp. `ROWS` names the weights every format is tried on; `float_rows` lets hypothesis look for others.
"""

import ctypes
import functools
import importlib.util
import itertools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from streamquant.quant.format import Importance, Rows
from streamquant.quant.formats import FORMATS
from tests.peers import DATA
from tests.smollm2 import MISSING, find_gguf

STORIES = DATA / "models" / "stories260K-bf16" / "model.safetensors"


@functools.cache
def _ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("ggml's own quantizer is in the package xllamacpp (pip install -e '.[dev]')")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # source, float32
        ctypes.c_void_p,  # destination
        ctypes.c_int64,  # start
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # weights per row
        ctypes.c_void_p,  # importance, float32 per weight of a row, or NULL
    ]
    return library


def ggml_encode(rows: Rows, format_name: str, importance: Importance | None = None) -> NDArray[np.uint8]:
    """float32[r, n], float32[n] or None -> uint8[r, bytes]: what llama-quantize writes."""
    kind = gguf.GGMLQuantizationType[format_name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, np.float32)
    r, n = rows.shape
    if n % block:  # ggml would abort the process
        raise ValueError(f"row length {n} is not a multiple of the {format_name} block size {block}")
    out = np.empty((r, n // block * size), np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        assert importance.shape == (n,)
    weights = None if importance is None else importance.ctypes.data
    written = _ggml().ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, r, n, weights)
    assert written == out.size
    return out


def ggml_decode(raw: NDArray[np.uint8], format_name: str) -> Rows:
    """uint8[r, bytes] -> float32[r, n]: ggml's own dequantize_row_*."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_name]]
    name = format_name.lower().replace("_k", "_K")
    decode = getattr(_ggml(), f"dequantize_row_{name}")
    decode.restype, decode.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    raw = np.ascontiguousarray(raw)
    out = np.empty((raw.shape[0], raw.shape[1] // size * block), np.float32)
    decode(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def same_values(found: Rows, expected: Rows) -> bool:
    """Whether all bits are equal; any NaN equals any other."""
    both_nan = np.isnan(found) & np.isnan(expected)
    return bool(((found.view(np.uint32) == expected.view(np.uint32)) | both_nan).all())


def assert_same_bytes(actual: NDArray[np.uint8], expected: NDArray[np.uint8], rows: Rows, entry: int = 1) -> None:
    """Fail with the first byte that differs, and the weights around it; `entry` is the bytes of a block."""
    assert actual.shape == expected.shape
    if np.array_equal(actual, expected):
        return
    differ = np.argwhere(actual != expected)
    i, at = (int(x) for x in differ[0])
    start = at // entry * entry
    weights = rows.shape[1] * entry // actual.shape[1]
    block = rows[i, start // entry * weights :][:weights]
    raise AssertionError(
        f"{len(differ)} of {actual.size} bytes differ; the first: row {i}, byte {at}, byte {at - start} of its block\n"
        f"  found:    {actual[i, start : start + entry].tobytes().hex()}\n"
        f"  expected: {expected[i, start : start + entry].tobytes().hex()}\n"
        f"  weights:  {[float(w).hex() for w in block]}"
    )


def check_against_ggml(rows: Rows, name: str, importance: Importance | None = None) -> NDArray[np.uint8]:
    """Encode with the format `name` and fail unless the bytes are ggml's; returns them."""
    (found,) = FORMATS[name].encode(rows, importance)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    assert_same_bytes(found, ggml_encode(rows, name, importance), rows, size)
    return found


def round_to(rows: Rows, dtype: str) -> Rows:
    """The float32 of the nearest values of `dtype` (a safetensors name): what a checkpoint of that dtype can hold."""
    largest = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}[dtype]
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    rounded: Rows = torch.from_numpy(np.clip(rows, -largest, largest)).to(kind).float().numpy()
    return rounded


Generator = Callable[[np.random.Generator, int, int], NDArray[np.floating]]


def _denormal(rng: np.random.Generator, r: int, n: int) -> Rows:
    """A magnitude a row, from 1e-36 down to 1e-45: scales become subnormal, then 1 / scale infinite, then zero."""
    return (rng.standard_normal((r, n)) * 10.0 ** -np.linspace(36, 45, r)[:, None]).astype(np.float32)


def _tiny_half(rng: np.random.Generator, r: int, n: int) -> Rows:
    """A magnitude a row, 1e-2 to 1e-9: scales are subnormal in float16, then zero there and not in float32."""
    return (rng.standard_normal((r, n)) * 10.0 ** -np.linspace(2, 9, r)[:, None]).astype(np.float32)


def _outlier(rng: np.random.Generator, r: int, n: int) -> Rows:
    rows = rng.standard_normal((r, n), np.float32)
    rows[np.arange(r), rng.integers(0, n, r)] = 3e4 * rng.choice(np.array([-1, 1]), r)
    return rows


def _signed_zeros(rng: np.random.Generator, r: int, n: int) -> Rows:
    rows = np.where(rng.random((r, n)) < 0.5, np.float32(0.0), np.float32(-0.0))
    some = rng.random((r, n)) < np.linspace(0, 0.1, r)[:, None]
    return np.where(some, -abs(rng.standard_normal((r, n))), rows).astype(np.float32)


def _equal_extremes(rng: np.random.Generator, r: int, n: int) -> Rows:
    """The largest magnitude occurs with both signs, the first of them at random."""
    rows = np.clip(rng.standard_normal((r, n)), -1, 1)
    signs = rng.choice(np.array([-1.0, 1.0]), (r, n))
    return np.where(rng.random((r, n)) < 0.2, signs, rows).astype(np.float32)


def _ties(rng: np.random.Generator, r: int, n: int) -> Rows:
    """Integers and halves, with a scale of 1 for Q8_0 (amax 127) or for blocks of 16 and 32 levels, and FP8 (448)."""
    rows = rng.integers(-2 * 127, 2 * 127 + 1, (r, n)) / 2
    for i, (low, high) in zip(range(r), itertools.cycle([(-127, 127), (-8, 7), (-16, 15), (0, 15), (0, 31), (0, 448)])):
        rows[i] = np.clip(rows[i], low, high)
        rows[i, ::32], rows[i, 1::32] = low, high
    return rows.astype(np.float32)


ROWS: Mapping[str, Generator] = {
    "normal": lambda rng, r, n: 0.02 * rng.standard_normal((r, n)),
    "student_t2": lambda rng, r, n: 0.02 * rng.standard_t(2, (r, n)),
    "student_t3": lambda rng, r, n: 0.02 * rng.standard_t(3, (r, n)),
    "bfloat16": lambda rng, r, n: round_to((0.02 * rng.standard_normal((r, n))).astype(np.float32), "BF16"),
    "positive": lambda rng, r, n: 1 + 0.02 * rng.standard_normal((r, n)),
    "negative": lambda rng, r, n: -rng.random((r, n)) - 1,
    "constant": lambda rng, r, n: np.repeat(rng.standard_normal((r, 1)), n, axis=1),
    "zero": lambda _rng, r, n: np.zeros((r, n)),
    "minus_zero": lambda _rng, r, n: np.full((r, n), -0.0),
    "signed_zeros": _signed_zeros,
    "small": lambda rng, r, n: 1e-12 * rng.standard_normal((r, n)),
    "denormal": _denormal,
    "tiny_half": _tiny_half,
    "sparse": lambda rng, r, n: rng.standard_normal((r, n)) * (rng.random((r, n)) < 0.05),
    "outlier": _outlier,
    "equal_extremes": _equal_extremes,
    "plus_minus_one": lambda rng, r, n: rng.choice(np.array([-1.0, 1.0]), (r, n)),
    "ties": _ties,
}
"""Named weights: (generator of random numbers, r, n) -> [r, n], finite, scales within float16."""


def make_rows(name: str, r: int, n: int) -> Rows:
    """float32[r, n] of the generator `name`; the same numbers every time."""
    return ROWS[name](np.random.default_rng(zlib.crc32(name.encode())), r, n).astype(np.float32)


def _stories() -> list[Rows]:
    if not STORIES.is_file():
        pytest.skip(f"no test data at {STORIES} (STREAMQUANT_DATA)")
    with safe_open(STORIES, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  not a dict
    return [tensor.float().numpy() for tensor in tensors if tensor.dim() == 2]


def _smollm2() -> list[Rows]:
    path = find_gguf()
    if path is None:
        pytest.skip(MISSING)
    wanted = {f"blk.{layer}.{part}.weight" for layer in (0, 29) for part in ("attn_k", "ffn_down", "attn_output")}
    found = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name in wanted]
    rows = [gguf.quants.dequantize(tensor.data[:130], tensor.tensor_type) for tensor in found]
    assert len(rows) == len(wanted)
    return rows


_REAL: Mapping[str, Callable[[], list[Rows]]] = {"stories260K": _stories, "SmolLM2": _smollm2}
REAL = tuple(_REAL)
"""Names of trained models; `real_matrices` skips the test where their files are missing."""


@functools.cache
def real_matrices(name: str) -> list[Rows]:
    """Matrices float32[r, n] of a trained model, read-only. Skips the test if the model is not there."""
    matrices = [np.ascontiguousarray(rows, np.float32) for rows in _REAL[name]()]
    for rows in matrices:
        rows.flags.writeable = False
    return matrices


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def float_rows(draw: st.DrawFn, r: int, n: int, values: st.SearchStrategy[float] = FINITE) -> Rows:
    """Finite float32[r, n]: random bits with exponents from a window, and a few `values` put among them."""
    exponents = sorted((draw(st.integers(0, 254), "exponent"), draw(st.integers(0, 254), "exponent")))
    few = draw(st.lists(values, min_size=1, max_size=8), "values")
    share = draw(st.sampled_from([1.0, 0.5, 0.1]), "share of values")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), "seed"))
    sign = rng.integers(0, 2, (r, n), np.uint32) << 31
    exponent = rng.integers(exponents[0], exponents[1] + 1, (r, n)).astype(np.uint32) << 23
    background = (sign | exponent | rng.integers(0, 2**23, (r, n), np.uint32)).view(np.float32)
    chosen = rng.choice(np.array(few, np.float32), (r, n))
    return np.where(rng.random((r, n)) < share, chosen, background)
