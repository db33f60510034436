"""Views of tensors: order of rows and columns, and values, against numpy's reshape; and what a run makes of them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamquant.convert.architectures import ModelDescription, describe
from streamquant.convert.architectures.tensor_view import (
    MINUS_EXP,
    PLUS_ONE,
    MovedRows,
    TensorView,
    ValueMap,
    resolve,
    rope_view,
)
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.layout import Entry
from streamquant.convert.plan.layout_gguf import GgufLayout
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import Recipe, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.gguf import GgufVariant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.conftest import TINY_PRE, write_small_tokenizer
from tests.gguf_peer import read_gguf

Values = NDArray[np.float32]


@given(heads=st.integers(1, 40), half=st.integers(1, 70))
def test_rope_is_the_interleaving_of_halves(heads: int, half: int) -> None:
    rows = heads * half * 2
    for view in (resolve(rope_view(heads, 2), (rows, 3)), resolve(rope_view(heads, 1), (rows,))):
        order = view.order()
        assert order.dtype == np.int64
        np.testing.assert_array_equal(order, np.arange(rows).reshape(heads, 2, half).swapaxes(1, 2).reshape(rows))
        np.testing.assert_array_equal(view.to if view.to is not None else order, np.argsort(order))
        assert view.row_step in (1, 2 * half)
    assert resolve(rope_view(heads, 2), (rows, 3)).n == 3


def of_v(values: Any) -> Any:
    """q and k of 8 rows, then v of 4 k heads, each with 3 v heads of 5."""
    v = values[16:].reshape(4, 3, 5, *values.shape[1:]).swapaxes(0, 1)
    return np.concatenate([values[:16], v.reshape(60, *values.shape[1:])])


QKV = (("q", 8), ("k", 8), ("g", 4), ("r", 3), ("d", 5))
QKVZ = (("g", 3), ("q", 2), ("k", 2), ("v", 4), ("z", 4))


def of_qkvz(values: Any) -> Any:
    q, k, v, _ = np.split(values.reshape(3, 12, -1), [2, 4, 8], axis=1)
    return np.concatenate([part.reshape(-1, values.shape[1]) for part in (q, k, v)])


CASES: dict[str, tuple[TensorView, tuple[int, ...], Callable[[Any], Any]]] = {
    "qkv": (TensorView("{q k (g r d)} c -> {q k (r g d)} c", QKV), (76, 6), of_v),
    "conv1d": (
        TensorView("{q k (g r d)} one c -> {q k (r g d)} c", QKV),
        (76, 1, 4),
        lambda values: of_v(values.reshape(76, 4)),
    ),
    "columns": (
        TensorView("o (g r d) -> o (r g d)", QKV[2:]),
        (7, 60),
        lambda values: values.reshape(7, 4, 3, 5).swapaxes(1, 2).reshape(7, 60),
    ),
    "vector": (
        TensorView("(g r) -> (r g)", (("g", 4), ("r", 3))),
        (12,),
        lambda values: values.reshape(4, 3).T.reshape(12),
    ),
    "matrix of a vector": (TensorView("(g d) -> g d", (("g", 3),)), (12,), lambda values: values.reshape(3, 4)),
    "column of a vector": (TensorView("(h one) -> h one", (("one", 1),)), (12,), lambda values: values.reshape(12, 1)),
    "first half": (TensorView("{gate up} c -> gate c", (("gate", 4),)), (9, 3), lambda values: values[:4]),
    "second half of each": (
        TensorView("e {gate up} c -> e up c", (("gate", 4), ("up", 4))),
        (3, 8, 5),
        lambda values: values[:, 4:],
    ),
    "odd rows": (TensorView("(f {a b}) c -> (f b) c", (("a", 1), ("b", 1))), (8, 3), lambda values: values[1::2]),
    "qkv of qkvz": (TensorView("(g {q k v z}) c -> {(g q) (g k) (g v)} c", QKVZ), (36, 5), of_qkvz),
}
NOPE = (("h", 3), ("nope", 4), ("v", 5))
TRANSPOSES: dict[str, tuple[TensorView, tuple[int, ...], Callable[[Any], Any]]] = {
    "k_b of kv_b": (
        TensorView("(h {nope v}) r -> h r nope", NOPE),
        (27, 6),
        lambda values: values.reshape(3, 9, 6)[:, :4].swapaxes(1, 2),
    ),
    "last rows of each": (
        TensorView("(h {nope v}) r -> h r v", NOPE),
        (27, 6),
        lambda values: values.reshape(3, 9, 6)[:, 4:].swapaxes(1, 2),
    ),
    "whole": (TensorView("a b -> b a"), (5, 3), lambda values: values.T),
    "odd columns": (
        TensorView("c (f {a b}) -> (f b) c", (("a", 1), ("b", 1))),
        (5, 8),
        lambda values: values[:, 1::2].T,
    ),
    "half of the columns of each": (
        TensorView("e c {gate up} -> e up c", (("gate", 4), ("up", 4))),
        (3, 5, 8),
        lambda values: values[:, :, 4:].swapaxes(1, 2),
    ),
    "rows in another order": (
        TensorView("u (a b) c -> u c (b a)", (("a", 2), ("b", 3))),
        (4, 6, 5),
        lambda values: values.reshape(4, 2, 3, 5).transpose(0, 3, 2, 1).reshape(4, 5, 6),
    ),
}


@pytest.mark.parametrize("case", TRANSPOSES)
def test_transposes_go_by_whole_units_and_back(case: str) -> None:
    view, shape, expected = TRANSPOSES[case]
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    resolved = resolve(view, shape)
    rows = values.reshape(resolved.rows, resolved.n)
    wanted = expected(values)
    assert resolved.stored_shape == wanted.shape
    stored = np.full((resolved.stored_rows, resolved.stored_n), np.nan, np.float32)
    back = np.full_like(rows, np.nan)
    for first in range(0, resolved.rows, resolved.row_step):
        moved = resolved.moved(first, first + resolved.row_step, resolved.row_step)
        block = rows[first : first + resolved.row_step]
        ((at, count),) = moved.runs
        arranged = resolved.arrange(block if moved.rows is None else block[moved.rows])
        assert arranged.flags.c_contiguous  # encoders take nothing else
        stored[at : at + count] = arranged
        resolved.put_back(stored[at : at + count], moved, back[first : first + resolved.row_step])
    np.testing.assert_array_equal(stored.reshape(wanted.shape), wanted)
    taken = ~np.isnan(back)
    assert taken.sum() == wanted.size
    np.testing.assert_array_equal(back[taken], rows[taken])
    whole = resolved.moved(0, resolved.rows, resolved.row_step)
    assert whole.runs == ((0, resolved.stored_rows),)
    np.testing.assert_array_equal(resolved.arrange(rows if whole.rows is None else rows[whole.rows]), stored)


@pytest.mark.parametrize("case", CASES)
def test_patterns_are_what_numpy_makes(case: str) -> None:
    view, shape, expected = CASES[case]
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    resolved = resolve(view, shape)
    rows = values.reshape(resolved.rows, resolved.n)[resolved.order()]
    if resolved.columns is not None:
        rows = rows[:, resolved.columns]
    np.testing.assert_array_equal(rows.reshape(resolved.stored_shape), expected(values))
    assert view.stored_shape(shape) == expected(values).shape
    back = np.zeros_like(values.reshape(resolved.rows, -1))
    order = resolved.order()
    resolved.put_back(rows, MovedRows(order, ()), back)
    np.testing.assert_array_equal(back[order], values.reshape(resolved.rows, -1)[order])


@pytest.mark.parametrize("case", CASES)
@given(chunk=st.integers(1, 40), block=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_blocks_fill_the_runs_of_a_chunk_from_their_front(case: str, chunk: int, block: int) -> None:
    view, shape, _ = CASES[case]
    resolved = resolve(view, shape)
    step = resolved.row_step
    filled = np.zeros(resolved.stored_rows, int)
    for first in range(0, resolved.rows, chunk * step):
        last = min(first + chunk * step, resolved.rows)
        runs = dict(resolved.moved(first, last, step).runs)
        at = dict(zip(runs, runs, strict=True))
        for start in range(first, last, block * step):
            moved = resolved.moved(start, min(start + block * step, last), step)
            rows = np.arange(min(block * step, last - start)) if moved.rows is None else moved.rows
            stored = [place for begin, count in moved.runs for place in range(begin, begin + count)]
            np.testing.assert_array_equal(resolved.order()[np.array(stored, int)], start + rows)
            for begin, count in moved.runs:
                run = max(run for run in runs if run <= begin)
                assert begin == at[run]
                at[run] += count
                filled[begin : begin + count] += 1
        assert at == {run: run + count for run, count in runs.items()}
    assert (filled == 1).all()


def test_values() -> None:
    x = np.array([[0.1, -3.5, 2.0**-20, 4.25]], np.float32)
    np.testing.assert_array_equal(PLUS_ONE.apply(x), x + np.float32(1))
    np.testing.assert_array_equal(MINUS_EXP.apply(x), (-np.exp(x.astype(np.longdouble))).astype(np.float32))
    np.testing.assert_array_equal(ValueMap("times", 0.1).apply(x), x * np.float32(0.1))
    for value in (PLUS_ONE, MINUS_EXP, ValueMap("times", 0.1)):
        assert value.apply(x).dtype == np.float32
        np.testing.assert_allclose(value.undo(value.apply(x)), x, atol=1e-6)


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (rope_view(1, 2), (7, 2)),
        (rope_view(4, 1), (12,)),
        (rope_view(8, 2), (0, 2)),
        (rope_view(4, 2), (16,)),
        (TensorView("{a b} c -> a c", (("a", 4), ("b", 4))), (9, 3)),
        (TensorView("{a b} c -> a c", (("a", 4),)), (4, 3)),
    ],
)
def test_another_shape_is_refused(view: TensorView, shape: tuple[int, ...]) -> None:
    with pytest.raises(StreamquantError, match="does not divide into heads and parts"):
        resolve(view, shape)


@pytest.mark.parametrize(
    "pattern", ["(a b) c -> b a", "(a b) c -> a (b c)", "a b -> a d", "(a b -> a b", "a-b c -> a c"]
)
def test_a_pattern_that_cannot_be_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"which is not supported|not a pattern|are not known|on its right"):
        resolve(TensorView(pattern, (("a", 2),)), (2, 3))


# --- in a conversion --------------------------------------------------------------------------------------------------

V_ORDER = (("g", 2), ("r", 2), ("d", 32))
VIEWS = {
    "self_attn.q_proj.weight": TensorView("(g r d) c -> (r g d) c", V_ORDER),
    "self_attn.o_proj.weight": TensorView("o (g r d) -> o (r g d)", V_ORDER),
    "mlp.down_proj.weight": TensorView("{a b c} n -> {c a} n", (("a", 20), ("b", 13))),
    "input_layernorm.weight": TensorView(value=PLUS_ONE),
    "self_attn.q_norm.weight": TensorView("(a b) -> (b a)", (("a", 8),), MINUS_EXP),
}


def seen(name: str, values: Values) -> Values:
    """What a GGUF should hold of a tensor."""
    if name.endswith("q_proj.weight"):
        return values.reshape(2, 2, 32, -1).swapaxes(0, 1).reshape(values.shape)
    if name.endswith("o_proj.weight"):
        return values.reshape(-1, 2, 2, 32).swapaxes(1, 2).reshape(values.shape)
    if name.endswith("down_proj.weight"):
        return np.concatenate([values[33:], values[:20]])
    if name.endswith("input_layernorm.weight"):
        return values + np.float32(1)
    if name.endswith("q_norm.weight"):
        return (-np.exp(values.astype(np.float64))).astype(np.float32).reshape(8, -1).T.reshape(-1)
    return values


def with_views(config: Mapping[str, object]) -> ModelDescription:
    description = describe(config)
    rules = {
        name: dataclasses.replace(rule, view=VIEWS.get(name.split(".", 3)[-1]))
        for name, rule in description.rules.items()
    }
    return dataclasses.replace(description, rules=rules)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("convert.plan.planner", "model.variants.gguf"):
        monkeypatch.setattr(f"streamquant.{module}.describe", with_views)
    folder = tmp_path / "model"
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    synthetic.write_checkpoint(folder, architecture="Qwen3ForCausalLM", tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("sizes", [None, (3000, 700), (20_000, 4096)])
def test_a_run_puts_every_row_where_the_view_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int] | None
) -> None:
    if sizes is not None:
        monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", sizes[0])
        for module in ("convert.plan.records", "convert.run.blocks", "validate.readback.verify"):
            monkeypatch.setattr(f"streamquant.{module}.BLOCK_WEIGHTS", sizes[1])
    source = open_checkpoint(model)
    options = ConversionOptions(pre=TINY_PRE)
    variants = parse_variants(["gguf:F32,BF16,Q8_0", "fp8-dynamic"])
    convert(make_plan(source, variants, options), tmp_path / "out", RunOptions(jobs=2))
    rules = with_views(source.config).rules
    for kind in ("F32", "BF16", "Q8_0"):
        path = tmp_path / "out" / "model-GGUF" / f"model-{kind}.gguf"
        _, tensors = read_gguf(path)
        variant = GgufVariant(path)
        for name, tensor in source.tensors.items():
            raw = np.frombuffer(source.read_range(tensor.file, tensor.start, tensor.stop), np.uint16)
            values = (raw.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
            stored_as, shape, content = tensors[rules[name].gguf_name]
            expected = seen(name, values)
            assert shape == expected.shape, name
            assert quantize(expected, stored_as).tobytes() == content, name
            if name.endswith("down_proj.weight"):
                continue  # the rows that were left out are nowhere
            read = np.concatenate([block.numpy() for _, block in variant.blocks(name)])
            tolerance = {"F32": 1e-6, "BF16": 0.02, "Q8_0": 0.02}[kind]
            np.testing.assert_allclose(read, values, atol=tolerance * abs(values).max(), err_msg=name)
    for result in verify(tmp_path / "out", source):
        assert result.problems == []
        assert result.total.sqnr_db > 25


def test_a_source_serves_several_stored_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fused projection does: each takes its rows, and verify encodes all of them again."""
    folder = tmp_path / "model"
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    synthetic.write_checkpoint(folder, architecture="Qwen3ForCausalLM", tokenizer=tokenizer)
    halves = {"even": "(r {even odd}) c -> (r even) c", "odd": "(r {even odd}) c -> (r odd) c"}
    entries = GgufLayout._entries

    def cut(self: GgufLayout, recipe: Recipe) -> Iterator[Entry]:
        for entry in entries(self, recipe):
            if entry.name != "blk.0.ffn_up.weight":
                yield entry
                continue
            for name, pattern in halves.items():
                view = TensorView(pattern, (("even", 1), ("odd", 1)))
                shape = view.stored_shape(entry.shape)
                yield dataclasses.replace(entry, name=f"blk.0.{name}.weight", view=view, shape=shape)

    monkeypatch.setattr(GgufLayout, "_entries", cut)
    monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", 3000)
    monkeypatch.setattr("streamquant.convert.run.blocks.BLOCK_WEIGHTS", 700)
    source = open_checkpoint(folder)
    plan = make_plan(source, parse_variants(["gguf:F32,Q8_0"]), ConversionOptions(pre=TINY_PRE))
    convert(plan, tmp_path / "out", RunOptions(jobs=2))
    tensor = source.tensors["model.layers.0.mlp.up_proj.weight"]
    raw = np.frombuffer(source.read_range(tensor.file, tensor.start, tensor.stop), np.uint16)
    values = (raw.astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
    for kind in ("F32", "Q8_0"):
        _, tensors = read_gguf(tmp_path / "out" / "model-GGUF" / f"model-{kind}.gguf")
        for number, name in enumerate(halves):
            stored_as, shape, content = tensors[f"blk.0.{name}.weight"]
            assert shape == (tensor.shape[0] // 2, tensor.shape[1])
            assert quantize(values[number::2], stored_as).tobytes() == content
    assert [result.problems for result in verify(tmp_path / "out", source)] == [[], []]
