"""Emulated activation quantization, against the formats of quant/ and against compressed-tensors."""

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant.model import activations
from streamquant.model.variants.inputs import group_of_fast
from streamquant.quant.formats import FORMATS


def some_rows(n: int, seed: int = 0, tokens: int = 40) -> Any:
    """float32[1, tokens, n] of many magnitudes, with zeros, ties and one outlier."""
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(1, tokens, n)) * np.exp(draw.normal(size=(1, tokens, 1)) * 6)
    rows[0, 0] = 0
    rows[0, 1, ::2] = 0
    rows[0, 2] = np.round(rows[0, 2])
    rows[0, 3, 5] *= 3000
    return torch.from_numpy(rows.astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["token", "group"]), st.integers(0, 10**6))
def test_e4m3_is_that_of_compressed_tensors(strategy: str, seed: int) -> None:
    size = 128 if strategy == "group" else None
    arguments = QuantizationArgs(num_bits=8, type="float", strategy=strategy, dynamic=True, group_size=size)
    holder = torch.nn.Module()
    holder.quantization_status = QuantizationStatus.COMPRESSED
    x = some_rows(384, seed)
    expected = forward_quantize(holder, x, "input", arguments)
    assert torch.equal(activations.through_e4m3(x, size or 384), expected)


@pytest.mark.parametrize(("strategy", "size", "n", "group"), [
    ("token", None, 48, 48), ("token", None, 40, None), ("group", 32, 64, 32), ("group", 24, 48, None),
    ("group", 32, 48, None), ("tensor", None, 48, None),
])  # fmt: skip
def test_e4m3_of_odd_lengths_is_left_to_compressed_tensors(
    strategy: str, size: int | None, n: int, group: int | None
) -> None:
    arguments = QuantizationArgs(num_bits=8, type="float", strategy=strategy, dynamic=True, group_size=size)
    found = group_of_fast(arguments, n)
    assert (found and found(n)) == group


def test_q8_0_is_the_format() -> None:
    x = some_rows(256).clamp(-60000, 60000)
    format_ = FORMATS["Q8_0"]
    expected = format_.decode(format_.encode(x[0].numpy()), 256)
    assert np.array_equal(activations.through_q8_0(x)[0].numpy(), expected)


@pytest.mark.parametrize("quantizer", [activations.through_q8_0, activations.through_q8_k])
def test_other_devices_compute_the_same(quantizer: activations.Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = some_rows(512)
    by_kernel = quantizer(x)
    monkeypatch.setattr(activations, "_on_cpu", lambda _x: False)
    assert torch.allclose(quantizer(x), by_kernel, rtol=1e-6, atol=0)
    assert float((by_kernel - x).norm() / x.norm()) < 0.01


def test_the_largest_of_a_q8_k_block_is_kept() -> None:
    x = some_rows(512)
    found = activations.through_q8_k(x).reshape(-1, 256)
    blocks = x.reshape(-1, 256)
    at = blocks.abs().argmax(1, keepdim=True)
    assert torch.allclose(found.gather(1, at), blocks.gather(1, at), rtol=1e-6)
    assert not found[0].any(), "zeros stay zeros"


def test_halves_are_rounded_once() -> None:
    x = some_rows(256)
    assert torch.equal(activations.through_bf16(x), x.bfloat16().float())
    assert torch.equal(activations.through_f16(x / 1e9), (x / 1e9).half().float())
