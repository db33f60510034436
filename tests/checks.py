"""The contract of a number format, as checks. Each runs on every format because it is in quant.formats.FORMATS.

A new format needs one line here: its error bound in `BOUNDS`, from its definition.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from streamquant.quant.format import WHOLE, Encoded, Format, Rows
from tests.oracle import ROWS, make_rows, round_to

Errors = NDArray[np.float64]
SEARCHED = {"Q2_K": 1.0, "Q3_K": 0.5, "Q4_K": 0.3, "Q5_K": 0.15, "Q6_K": 0.07, "IQ4_NL": 0.25, "IQ4_XS": 0.3}
"""Formats whose scales come from a search, and how far a weight may move, as a part of its super-block's largest."""
SAFETENSORS_BYTES = {"F8_E4M3": 1, "U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}
NOT_IDEMPOTENT = ("INT", "MXFP4_", "MXFP8_", "NVFP4_", "FP8_TENSOR_", "FP8_CHANNEL_CALIBRATED_")
"""Of formats with other bytes for values that they have rounded, as their reference: the largest magnitude of a group
is no code of INT, what E4M3 rounds to 448 takes the next power of two as scale, the -0.0 of E2M1 becomes its 0, as
that of FP8 does where llm-compressor calibrates, and the largest value of an NVFP4 tensor is another one than that of
its weights."""


def source_dtype(format_: Format) -> str:
    """The dtype whose values the format is defined on: FP8 has one format for each, the others take any float32."""
    return format_.source_dtype or "F32"


def row_length(format_: Format) -> int:
    """A row of a few blocks, the last one incomplete where the format allows it."""
    n = 256 + 4 * max(32, format_.weights_per_block)
    return n + 37 if format_.fits(n + 37) else n


def sample(format_: Format, name: str, r: int) -> Rows:
    return round_to(make_rows(name, r, row_length(format_)), source_dtype(format_))


def same(a: Encoded, b: Encoded) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
    )


def check_sizes(format_: Format) -> None:
    """Sizes are known before a weight is read, and are what encode gives, whole blocks or not."""
    for r in (0, 1, 3, format_.rows_per_group, 2 * format_.rows_per_group + 1):
        for n in {format_.weights_per_block, row_length(format_)}:
            encoded = format_.encode(np.ones((r, n), np.float32))
            assert format_.nbytes(r, n) == sum(array.nbytes for array in encoded)
            for part, array, empty in zip(format_.parts, encoded, format_.allocate(r, n), strict=True):
                assert array.dtype == empty.dtype == np.uint8
                assert array.shape == empty.shape == (part.entries(r), part.bytes_per_entry(n))
                assert array.flags.c_contiguous
                assert part.nbytes(r, n) == array.nbytes
                shape = part.stored_shape((r, n))
                if part.stored_as in SAFETENSORS_BYTES:
                    assert np.prod(shape) * SAFETENSORS_BYTES[part.stored_as] == array.nbytes
                else:
                    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[part.stored_as]]
                    assert block == format_.weights_per_block
                    assert np.prod(shape) // block * size == array.nbytes


def check_names_of_parts(format_: Format) -> None:
    """The weights keep the tensor's name, or are called packed; no two parts share one."""
    suffixes = [part.suffix for part in format_.parts]
    assert suffixes[0] == ("_packed" if format_.stored.name in ("U8", "I32") else "")
    assert format_.parts[0].stored_as == format_.stored.name
    assert len(set(suffixes)) == len(suffixes)


def check_refuses_incomplete_blocks(format_: Format) -> None:
    """A row length that does not fit is refused, with what and why; every other one is taken."""
    block = format_.weights_per_block
    for n in (1, block - 1, block, block + 1, 2 * block, 33):
        if format_.pads_rows or n % block == 0:
            assert format_.fits(n)
            format_.allocate(2, n)
            continue
        assert not format_.fits(n)
        message = f"^row length {n} is not a multiple of the {format_.name} block size {block}$"
        with pytest.raises(ValueError, match=message):
            format_.allocate(2, n)
        with pytest.raises(ValueError, match=message):
            format_.encode(np.zeros((2, n), np.float32))


def check_refuses_other_arrays(format_: Format) -> None:
    """Only native float32[r, n] is taken."""
    n = row_length(format_)
    for rows, found in (
        (np.zeros((2, n)), f"float64[2, {n}]"),
        (np.zeros((2, n), np.float16), f"float16[2, {n}]"),
        (np.zeros((2, n), np.int32), f"int32[2, {n}]"),
        (np.zeros((2, n), ">f4"), f">f4[2, {n}]"),
        (np.zeros(n, np.float32), f"float32[{n}]"),
        (np.zeros((1, 2, n), np.float32), f"float32[1, 2, {n}]"),
    ):
        with pytest.raises(ValueError) as error:
            format_.encode(rows)  # type: ignore[arg-type]
        assert str(error.value) == f"{format_.name} encodes float32[rows, n], not {found}"


def check_writes_every_byte(format_: Format) -> None:
    """The same input gives the same bytes whatever was in the output before, and stays as it was."""
    rows = sample(format_, "normal", format_.rows_per_group + 3)
    before = rows.tobytes()
    outputs = []
    for fill in (0x00, 0xFF):
        out = format_.allocate(*rows.shape)
        for array in out:
            array[:] = fill
        assert format_.encode_into(rows, out, None) == -1
        outputs.append(out)
    assert same(*outputs)
    assert same(outputs[0], format_.encode(rows))
    assert rows.tobytes() == before


def check_decode_is_pure(format_: Format) -> None:
    """Decoding gives float32[r, n], twice the same, from read-only bytes, and leaves no view of them behind."""
    rows = sample(format_, "normal", format_.rows_per_group + 3)
    encoded = format_.encode(rows)
    for array in encoded:
        array.flags.writeable = False
    first, second = (format_.decode(encoded, rows.shape[1]) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == rows.shape
    assert first.tobytes() == second.tobytes()


def check_groups_are_independent(format_: Format) -> None:
    """Any run of whole groups, the last one complete or not, encodes alone to its slice of the whole.

    What is there once for the whole tensor is no matter of groups; what it takes is found before.
    """
    group = format_.rows_per_group
    rows = sample(format_, "student_t2", 3 * group + max(1, group // 3))
    whole, amax = format_.encode(rows), float(abs(rows).max())

    def encode(some: Rows) -> Encoded:
        if format_.encode_from_amax is None:
            return format_.encode(some)
        out = format_.allocate(*some.shape)
        assert format_.encode_from_amax(some, out, amax) == -1
        return out

    groups = -(-len(rows) // group)
    for first in range(groups):
        for last in range(first + 1, groups + 1):
            run = slice(first * group, min(last * group, len(rows)))
            alone = encode(rows[run])
            for part, of_run, of_whole in zip(format_.parts, alone, whole, strict=True):
                if part.rows_per_entry != WHOLE:
                    expected = of_whole[run.start // part.rows_per_entry : part.entries(run.stop)]
                    assert same((of_run,), (expected,)), f"groups {first} to {last}"
            decoded = format_.decode(whole, rows.shape[1])[run]
            assert format_.decode(alone, rows.shape[1]).tobytes() == decoded.tobytes()


def check_strided_and_read_only_input(format_: Format) -> None:
    """Arrays of any strides, and read-only ones, encode like their contiguous copies."""
    n = row_length(format_)
    big = round_to(make_rows("normal", 12, 2 * n), source_dtype(format_))
    read_only = big[:5, :n].copy()
    read_only.flags.writeable = False
    views = [big[::3, :n], big[:5, ::2], big[::-1, n - 1 :: -1], np.asfortranarray(big[:7, :n]), read_only]
    for view in views:
        assert same(format_.encode(view), format_.encode(np.array(view, order="C")))


def check_two_threads(format_: Format) -> None:
    """Threads share nothing: eight at a time, each with rows of its own, give the bytes of one."""
    inputs = [sample(format_, name, 200) for name in ("normal", "student_t3", "sparse", "bfloat16")] * 8
    alone = [format_.encode(rows) for rows in inputs]
    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(alone, pool.map(format_.encode, inputs), strict=True):
            assert same(found, expected)


def check_zeros(format_: Format) -> None:
    """Zeros of either sign decode to zeros."""
    for name in ("zero", "minus_zero"):
        rows = sample(format_, name, 2)
        assert not format_.decode(format_.encode(rows), rows.shape[1]).any()


def check_error_bound(format_: Format) -> None:
    """No weight moves farther than the definition of the format allows; the bound is not idle either."""
    bound = BOUNDS[format_.name]
    closest = 0.0
    for name in ROWS:
        rows = sample(format_, name, format_.rows_per_group + 9)
        decoded = format_.decode(format_.encode(rows), rows.shape[1])
        errors, allowed = abs(decoded.astype(np.float64) - rows), bound(rows)
        worst = np.unravel_index(np.argmax(errors - allowed), rows.shape)
        assert (errors <= allowed).all(), f"{name}: {rows[worst]!r} became {decoded[worst]!r}, within {allowed[worst]}"
        closest = max(closest, float(np.divide(errors, allowed, where=allowed > 0, out=np.zeros_like(errors)).max()))
    assert closest > 0.8 or format_.name in ("F32", *SEARCHED), (
        f"the bound is loose: at most {closest:.2f} of it is used"
    )


def check_idempotent(format_: Format) -> None:
    """Values that the format has already rounded are kept: decoding and encoding again gives the same bytes."""
    if format_.name.startswith(NOT_IDEMPOTENT):
        return
    if format_.name in SEARCHED:  # the search may find other scales for rounded values
        return
    for name in ("normal", "student_t3", "bfloat16", "positive", "equal_extremes", "outlier"):
        rows = sample(format_, name, format_.rows_per_group + 2)
        once = format_.encode(rows)
        assert same(once, format_.encode(format_.decode(once, rows.shape[1]))), name


def check_overflow(format_: Format) -> None:
    """encode_into returns the first row that decodes to an infinity or a NaN, and -1 only if there is none."""
    halves = np.float32(65520) * np.array([1, 8, 16, 127, 15 / 2, 31 / 2], np.float32)  # where scales leave float16
    ends = np.array([0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF], np.uint32).view(np.float32)  # where weights leave bfloat16
    dtype = source_dtype(format_)
    for value in (65504.0, *np.nextafter(halves, np.float32(0)), *halves, *np.nextafter(halves, ends[2]), *ends):
        for sign in (1, -1):
            for at in ([0], [5], [6, 9], [10]):
                rows = make_rows("normal", 11, row_length(format_))
                rows[at, 40] = sign * value
                rows[at, 41] = -sign * value * (len(at) % 2)
                rows = round_to(rows, dtype)
                out = format_.allocate(*rows.shape)
                returned = format_.encode_into(rows, out, None)
                with np.errstate(invalid="ignore", over="ignore"):
                    lost = ~np.isfinite(format_.decode(out, rows.shape[1])).all(axis=1)
                expected = int(lost.argmax()) if lost.any() else -1
                assert returned == expected, f"{sign * value} in rows {at}"
                assert expected in (-1, at[0])


def _half_step(precision: int, subnormal: float, x: Errors) -> Errors:
    """Half the distance between neighbours around x, of a float of `precision` bits; `subnormal`: of the smallest."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(abs(x)))
    half: Errors = np.maximum(np.exp2(exponent - precision), subnormal / 2)
    return half


def _float16(x: Errors) -> Errors:
    return _half_step(11, 2.0**-24, x)


def _blocks(rows: Rows) -> Errors:
    return rows.reshape(rows.shape[0], -1, 32).astype(np.float64)


def _signed(half: int, rows: Rows) -> Errors:
    """q of -half to half - 1, d = the largest magnitude / -half: half a step, and the opposite extreme is cut off."""
    blocks = _blocks(rows)
    d = abs(blocks).max(axis=-1, keepdims=True) / half
    extreme = np.take_along_axis(blocks, abs(blocks).argmax(axis=-1)[..., None], -1)
    cut = np.maximum(-np.sign(extreme) * blocks - (half - 0.5) * d, 0)
    bound: Errors = d / 2 + cut + half * _float16(d) + 1e-6 * half * d
    return bound.reshape(rows.shape)


def _symmetric(rows: Rows) -> Errors:
    d = abs(_blocks(rows)).max(axis=-1, keepdims=True) / 127
    return np.broadcast_to(d / 2 + 127 * _float16(d) + 127e-6 * d, _blocks(rows).shape).reshape(rows.shape)


def _offset(levels: int, rows: Rows) -> Errors:
    """q of 0 to levels, d = (max - min) / levels: half a step, and the rounding of both scales."""
    blocks = _blocks(rows)
    low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
    d = (high - low) / levels
    bound = d / 2 + levels * _float16(d) + _float16(low) + 1e-6 * np.maximum(abs(low), abs(high))
    return np.broadcast_to(bound, blocks.shape).reshape(rows.shape)


def _mxfp4(rows: Rows) -> Errors:
    """E2M1 at a power of two: half of the widest step (from 4 to 6, scaled), or what is above 6, up to 8."""
    amax = abs(_blocks(rows)).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.exp2(np.round(np.floor(np.log2(amax.astype(np.float32)))).astype(np.float64) - 2)
    moved = np.maximum(1.0, abs(_blocks(rows)) / np.maximum(scale, 2.0**-200) - 6) * scale
    # scales below 2**-127 wrap around: such weights become 0
    bound = np.where(scale < 2.0**-127, amax, moved * (1 + 1e-6)) + 2.0**-127
    return np.broadcast_to(bound, _blocks(rows).shape).reshape(rows.shape)


def _ternary(rows: Rows) -> Errors:
    """-d, 0 or d with d = amax of 256: half of it, and the rounding of d."""
    blocks = rows.reshape(rows.shape[0], -1, 256).astype(np.float64)
    d = abs(blocks).max(axis=-1, keepdims=True)
    bound = d / 2 * (1 + 1e-6) + _float16(d)
    # 1 / d is infinite for the smallest d: such weights become 0
    bound = np.where(d < 2.0**-127, d, bound)
    return np.broadcast_to(bound, blocks.shape).reshape(rows.shape)


def _source(dtype: str) -> tuple[int, float, float]:
    """Bits of precision, the smallest value and eps of a dtype."""
    return {"BF16": (8, 2.0**-133, 2.0**-7), "F16": (11, 2.0**-24, 2.0**-10)}.get(dtype, (24, 2.0**-149, 2.0**-23))


def _fp8(dtype: str, shared_by: Literal["row", "tile", "tensor"], rows: Rows) -> Errors:
    """Half a step of E4M3 and of the source dtype, at w / scale; a scale that was rounded down cuts off at 448."""
    precision, subnormal, eps = _source(dtype)
    w = rows.astype(np.float64)
    amax = np.empty_like(w)
    height, width = {"row": (1, w.shape[1]), "tile": (128, 128), "tensor": w.shape}[shared_by]
    for i in range(0, w.shape[0], height):
        for j in range(0, w.shape[1], width):
            amax[i : i + height, j : j + width] = abs(w[i : i + height, j : j + width]).max()
    scale = round_to((amax / 448).astype(np.float32), dtype).astype(np.float64)
    scale[scale == 0] = eps
    q = abs(w) / scale
    q16 = q + _half_step(precision, subnormal, q)
    kept = np.minimum(q16, 448)
    moved = (q16 - q) + _half_step(4, 2.0**-9, kept) + np.maximum(q16 - 448, 0)
    return scale * moved + 1e-6 * abs(w) + 2.0**-150  # decoding rounds to float32


def _integers(dtype: str, bits: int, group: int | None, zero_point: bool, rows: Rows) -> Errors:
    """Half a step, or what is beyond the last code; the source dtype rounds the quotient, and the zero point twice."""
    precision, subnormal, eps = _source(dtype)
    w = rows.reshape(rows.shape[0], -1, group or rows.shape[1]).astype(np.float64)
    low, high = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
    levels = 2.0**bits - 1
    span = round_to((high - low).astype(np.float32), dtype)
    scale = span / levels if zero_point else np.maximum(-low, high) / (levels / 2)
    scale = round_to(scale.astype(np.float32), dtype).astype(np.float64)
    scale[scale == 0] = eps
    half, q = 2.0 ** (bits - 1), w / scale
    zero = np.clip(-half - low / scale, -half, half - 1) if zero_point else np.zeros_like(low)
    zero = np.where(high == low, 0, zero)
    beyond = np.maximum(q + zero - (half - 1), -half - q - zero) + 0.5 * zero_point  # the zero point is an integer
    roundings = _half_step(precision, subnormal, q)
    if zero_point:
        roundings = roundings + 3 * _half_step(precision, subnormal, np.maximum(-low / scale, half))
    bound = scale * (np.maximum(beyond, 0.5) + roundings) + 1e-6 * abs(w) + 2.0**-149
    return np.broadcast_to(bound, w.shape).reshape(rows.shape)


def _mx(dtype: str, offset: int, rows: Rows) -> Errors:
    """Half a step of E2M1 (offset 2) or E4M3 (offset 8) at a power of two, or what is above 6, up to 7."""
    precision, subnormal, _ = _source(dtype)
    blocks = _blocks(rows)
    amax = abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(amax * 8 / 7))
    smallest = 2.0**-14 if dtype == "F16" else 2.0**-126
    none = 1.0 if dtype == "F16" else 2.0**-127
    scale = np.where(amax < smallest, none, np.maximum(np.exp2(exponent - offset), 2.0**-127))
    q = abs(blocks) / scale
    if offset == 2:
        step = np.where(q < 2, 0.25, np.where(q < 4, 0.5, 1.0))
    else:
        step = _half_step(4, 2.0**-9, np.minimum(q, 448)) + np.maximum(q - 448, 0)
    moved = step + _half_step(precision, subnormal, q)
    return (scale * moved + 1e-6 * abs(blocks) + 2.0**-149).reshape(rows.shape)


def _nvfp4(dtype: str, rows: Rows) -> Errors:
    """Half a step of E2M1 at a scale that E4M3 and the source dtype round, or what is above 6 of the largest scale."""
    w = rows.astype(np.float64)
    groups = w.reshape(rows.shape[0], -1, 16)
    amax, tensor = abs(groups).max(axis=-1, keepdims=True), abs(w).max()
    g = 2688 / tensor if tensor > 2688 / 3.39e38 else 1.0  # infinite below
    precision, _, _ = _source(dtype)
    roundings = 2.0 ** -(precision - 1) if tensor > 1e37 else 2.0**-precision
    s = g * amax / 6
    relative = np.where(s < 2.0**-6, 2.0**-10 / np.maximum(s, 2.0**-10), 2.0**-4) + 4 * roundings
    scale = np.where(s < 2.0**-10, 0.125, s) / g * (1 + relative)
    q = abs(groups) / np.maximum(scale / (1 + relative), 1e-300)
    step = np.where(q < 2 * (1 - relative), 0.25, np.where(q < 4 * (1 - relative), 0.5, 1.0))
    beyond = np.maximum(abs(groups) - 6 * np.maximum(s / g * (1 - relative), 0), 0)
    bound: Errors = np.maximum(scale * step, np.where(s < 2.0**-10, 0, beyond)) + 1e-6 * abs(groups) + 2.0**-149
    return bound.reshape(rows.shape)


def _searched(step: float, width: int, rows: Rows) -> Errors:
    """Formats with a search trade single weights for the sum of squares: within `step` of the block's largest."""
    blocks = rows.reshape(rows.shape[0], -1, width).astype(np.float64)
    largest = abs(blocks).max(axis=-1, keepdims=True)
    denormal_scales = 4096 * 2.0**-25  # levels times half the last place of a subnormal float16
    return np.broadcast_to(step * largest + denormal_scales, blocks.shape).reshape(rows.shape)


BOUNDS: Mapping[str, Callable[[Rows], Errors]] = {
    "F32": lambda rows: np.zeros(rows.shape),
    "F16": lambda rows: _float16(rows.astype(np.float64)),
    "BF16": lambda rows: _half_step(8, 2.0**-133, rows.astype(np.float64)),
    "Q8_0": _symmetric,
    "Q4_0": partial(_signed, 8),
    "Q5_0": partial(_signed, 16),
    "Q4_1": partial(_offset, 15),
    "Q5_1": partial(_offset, 31),
    **{name: partial(_searched, step, 32 if name == "IQ4_NL" else 256) for name, step in SEARCHED.items()},
    "MXFP4": _mxfp4,
    "TQ1_0": _ternary,
    "TQ2_0": _ternary,
    **{f"FP8_CHANNEL_{dtype}": partial(_fp8, dtype, "row") for dtype in ("BF16", "F16", "F32")},
    **{f"FP8_CHANNEL_CALIBRATED_{dtype}": partial(_fp8, dtype, "row") for dtype in ("BF16", "F16", "F32")},
    **{f"FP8_BLOCK_{dtype}": partial(_fp8, dtype, "tile") for dtype in ("BF16", "F16", "F32")},
    **{f"FP8_TENSOR_{dtype}": partial(_fp8, dtype, "tensor") for dtype in ("BF16", "F16", "F32")},
    **{f"INT8_CHANNEL_{dtype}": partial(_integers, dtype, 8, None, False) for dtype in ("BF16", "F16", "F32")},
    **{f"INT8_GROUP_128_{dtype}": partial(_integers, dtype, 8, 128, False) for dtype in ("BF16", "F16", "F32")},
    **{
        f"INT4_GROUP_{group}{kind}_{dtype}": partial(_integers, dtype, 4, group, bool(kind))
        for group in (128, 32)
        for kind in ("", "_ZERO_POINT")
        for dtype in ("BF16", "F16", "F32")
    },
    **{f"MXFP4_{dtype}": partial(_mx, dtype, 2) for dtype in ("BF16", "F16", "F32")},
    **{f"NVFP4_{dtype}": partial(_nvfp4, dtype) for dtype in ("BF16", "F16", "F32")},
    **{f"MXFP8_{dtype}": partial(_mx, dtype, 8) for dtype in ("BF16", "F16", "F32")},
}
"""By format: float32[r, n] -> how far each weight may be after decode(encode()), from the definition of the format."""

CHECKS: tuple[Callable[[Format], None], ...] = (
    check_sizes,
    check_names_of_parts,
    check_refuses_incomplete_blocks,
    check_refuses_other_arrays,
    check_writes_every_byte,
    check_decode_is_pure,
    check_groups_are_independent,
    check_strided_and_read_only_input,
    check_two_threads,
    check_zeros,
    check_error_bound,
    check_idempotent,
    check_overflow,
)
