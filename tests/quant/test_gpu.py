"""The GPU encoders against ggml and the CPU encoders, byte for byte.

Without a GPU the kernels run in Triton's interpreter: the same operations in the same order, on NumPy. What only a GPU
can show (that the compiler keeps them so) is checked on what it makes of them: PTX without fused operations and
approximate divisions. On a GPU the same tests run on it.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest

from streamquant.quant import gpu
from streamquant.quant.format import Importance, Rows
from streamquant.quant.formats import FORMATS
from tests.gpu import DEVICE, HAS_TRITON, Call, caller, encode
from tests.oracle import ROWS, assert_same_bytes, ggml_encode, make_rows, round_to

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it has wheels for Linux alone)")

FP8 = sorted(name for name in gpu.ENCODED if name.startswith("FP8"))
BLOCKS = gpu.ENCODED - set(FP8)
WEIGHTED = {name for name in gpu.ENCODED if FORMATS[name].uses_importance}
QUICK_IMPORTANCE = {"Q4_0", "Q4_K", "Q3_K", "IQ4_NL"}
"""A format for each of the searches with importance; the others are long."""


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.long)


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with caller() as function:
        yield function


def mixed_rows(r: int, n: int) -> Rows:
    """Sub-blocks of very different magnitude, constants and zeros among them."""
    rng = np.random.default_rng(5)
    scale = np.exp2(rng.uniform(-30, 0, (r, n // 16, 1)) + rng.uniform(-40, 10, (r, 1, 1)))
    weights = rng.standard_normal((r, n // 16, 16)) * scale
    kind = rng.integers(0, 6, (r, n // 16, 1))
    return np.where(kind == 0, 0.0, np.where(kind == 1, scale, weights)).reshape(r, n).astype(np.float32)


def any_rows(r: int, n: int) -> Rows:
    """Random bits: every magnitude that float32 has, scales that overflow in most rows."""
    rows = np.random.default_rng(6).integers(0, 2**32, (r, n), np.uint32).view(np.float32)
    return np.where(np.isfinite(rows), rows, np.float32(0.0))


def all_rows(r: int, n: int) -> Rows:
    """`r` rows of every generator of the oracle, and of the two above."""
    return np.concatenate([*(make_rows(name, r, n) for name in ROWS), mixed_rows(2 * r, n), any_rows(2 * r, n)])


def importances(n: int) -> dict[str, Importance]:
    rng = np.random.default_rng(7)
    positive = rng.random(n) + 1e-3
    return {
        "positive": positive.astype(np.float32),
        "with zeros": (positive * (rng.random(n) < 0.5)).astype(np.float32),
        "zero": np.zeros(n, np.float32),
        "wide": np.exp(10 * rng.standard_normal(n)).astype(np.float32),
    }


def check(call: Call, name: str, rows: Rows, importance: Importance | None = None) -> None:
    """Equal bytes in every row that is not refused, and the same first refused row as the CPU's."""
    found, overflow = call(encode, name, rows, importance)
    expected = FORMATS[name].allocate(*rows.shape)
    assert overflow == FORMATS[name].encode_into(rows, expected, importance)
    with np.errstate(all="ignore"):
        kept = np.isfinite(FORMATS[name].decode(expected, rows.shape[1])).all(axis=1)
    assert kept.sum() > len(rows) / 2
    if name in gguf.GGMLQuantizationType.__members__:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
        assert_same_bytes(found[0][kept], ggml_encode(rows, name, importance)[kept], rows[kept], size)
    for part, there in zip(found, expected, strict=True):
        if len(part) == len(rows):
            assert np.array_equal(part[kept], there[kept])
        else:
            assert np.array_equal(part, there)


@pytest.mark.parametrize("name", [name if name != "IQ4_NL" else slow(name) for name in sorted(BLOCKS)])
def test_encodes_like_ggml(call: Call, name: str) -> None:
    """An odd number of super-blocks a row, so that programs begin in the middle of rows."""
    check(call, name, all_rows(2, 768))


@pytest.mark.parametrize("name", [name if name in QUICK_IMPORTANCE else slow(name) for name in sorted(WEIGHTED)])
def test_encodes_like_ggml_with_importance(call: Call, name: str) -> None:
    rows = np.concatenate([make_rows(kind, 2, 768) for kind in ("normal", "tiny_half", "sparse", "denormal")])
    check(call, name, np.concatenate([rows, mixed_rows(8, 768)]), importances(768)["with zeros"])


@pytest.mark.parametrize("name", FP8)
def test_fp8_like_the_cpu(call: Call, name: str) -> None:
    """Incomplete tiles at both edges; rows longer than a program takes at a time."""
    dtype = FORMATS[name].source_dtype or ""
    check(call, name, round_to(np.ascontiguousarray(all_rows(7, 336)[:, :333]), dtype))
    check(call, name, round_to(make_rows("student_t2", 3, 5000), dtype))


@pytest.mark.parametrize("name", sorted(gpu.ENCODED))
def test_no_rows(call: Call, name: str) -> None:
    parts, overflow = call(encode, name, np.empty((0, 256), np.float32))
    assert overflow == -1
    assert all(part.size == 0 for part in parts)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_encodes_much_like_ggml(call: Call, name: str) -> None:
    """More rows than a program takes, of every kind, with every kind of importance."""
    rows = all_rows(40, 512)
    check(call, name, rows)
    if FORMATS[name].uses_importance:
        for importance in importances(512).values():
            check(call, name, rows, importance)
    for blocks in (1, 3, 17):
        n = blocks * FORMATS[name].weights_per_block
        check(call, name, make_rows("student_t3", 21, n), make_rows("positive", 1, n)[0])


POINTERS = {
    "rows": "*fp32",
    "found": "*fp32",
    "scales": "*fp32",
    "coarse": "*fp32",
    "importance": "*fp32",
    "sigma2": "*fp32",
    "values": "*i8",
    "out": "*u8",
    "codes": "*u8",
    "overflow": "*i32",
}
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("legacy_gpu", "_q8_0", {"BLOCKS": 64}),
    ("legacy_gpu", "_signed", {"half": 16, "BLOCKS": 64}),
    ("fp8_gpu", "_tiles", {"dtype": 1}),
    ("kquants_gpu", "_search_q6_k", {"weighted": False, "LANES": 128}),
    ("kquants_gpu", "_values_q6_k", {"BLOCKS": 8}),
]
MORE_KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("legacy_gpu", "_with_minimum", {"levels": 31, "BLOCKS": 64}),
    ("legacy_gpu", "_search_signed", {"half": 8, "LANES": 128}),
    ("legacy_gpu", "_store_signed", {"half": 8, "BLOCKS": 64}),
    ("legacy_gpu", "_search_with_minimum", {"levels": 15, "LANES": 128}),
    ("legacy_gpu", "_store_with_minimum", {"levels": 15, "BLOCKS": 64}),
    ("fp8_gpu", "_channel", {"dtype": 0, "ROWS": 1, "COLUMNS": 2048}),
    *(("kquants_gpu", "_search_4_or_5", {"levels": 15, "weighted": w, "LANES": 128}) for w in (False, True)),
    *(("kquants_gpu", "_search_q2_k", {"weighted": w, "LANES": 128}) for w in (False, True)),
    *(("kquants_gpu", "_search_q3_k", {"weighted": w, "LANES": 128}) for w in (False, True)),
    ("kquants_gpu", "_search_q6_k", {"weighted": True, "LANES": 128}),
    *(("kquants_gpu", "_search_scales", {"width": n, "levels": m, "LANES": 128}) for n, m in ((8, 63), (16, 64))),
    *(("kquants_gpu", "_scales_4_or_5", {"size": 144, "weighted": w, "BLOCKS": 8}) for w in (False, True)),
    *(("kquants_gpu", f"_scales_{q}", {"weighted": False, "BLOCKS": 8}) for q in ("q2_k", "q3_k", "q6_k")),
    ("kquants_gpu", "_values_4_or_5", {"levels": 31, "limit_first": True, "BLOCKS": 8}),
    ("kquants_gpu", "_values_q2_k", {"limit_first": False, "BLOCKS": 8}),
    ("kquants_gpu", "_values_q3_k", {"BLOCKS": 8}),
    *(("iq4_gpu", "_search", {"weighted": w, "LANES": 128}) for w in (False, True)),
    ("iq4_gpu", "_store_nl", {"BLOCKS": 64}),
    ("iq4_gpu", "_store_xs", {"BLOCKS": 8}),
]


def check_compiled(folder: Path, module: str, name: str, constants: dict[str, Any]) -> None:
    """Every single-precision operation rounds to nearest, none is fused, and nothing is spilled from registers."""
    import importlib

    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"streamquant.quant.kernels.{module}"), name)
    pointers = POINTERS | ({"scales": "*u8"} if module == "fp8_gpu" else {})
    signature = {argument: pointers.get(argument, "i32") for argument in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    options = {"num_warps": 8 if module == "fp8_gpu" else 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    operations = set(re.findall(r"^\s*(?:@\S+ )?((?:fma|mad|add|sub|mul|div|sqrt|rcp|rsqrt)\.[\w.]*f32)", ptx, re.M))
    assert operations
    assert operations <= {f"{operation}.rn.f32" for operation in ("add", "sub", "mul", "div", "sqrt")}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    )
    assert "STACK:0 " in usage.stdout


@pytest.mark.parametrize(("module", "name", "constants"), KERNELS)
def test_compiles_to_strict_arithmetic(tmp_path: Path, module: str, name: str, constants: dict[str, Any]) -> None:
    check_compiled(tmp_path, module, name, constants)


@pytest.mark.long
@pytest.mark.parametrize(("module", "name", "constants"), MORE_KERNELS)
def test_more_kernels_compile_to_strict_arithmetic(
    tmp_path: Path, module: str, name: str, constants: dict[str, Any]
) -> None:
    check_compiled(tmp_path, module, name, constants)


def test_kernels_are_launched_without_fusion() -> None:
    """A product and a sum in one operation round once, not twice."""
    from streamquant.quant.kernels.bits_gpu import launch

    kernel = mock.MagicMock()
    launch(kernel, 10, 4, "argument", LANES=4)
    kernel.__getitem__.assert_called_once_with((3,))
    kernel[3].assert_called_once_with("argument", LANES=4, num_warps=4, enable_fp_fusion=False)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("name", sorted(gpu.ENCODED))
def test_a_large_matrix_on_the_gpu(call: Call, name: str) -> None:
    """What the interpreter is too slow for: many programs at once."""
    dtype = FORMATS[name].source_dtype or "F32"
    rows = round_to(np.concatenate([make_rows(kind, 512, 4096) for kind in ROWS]), dtype)
    check(call, name, rows)
