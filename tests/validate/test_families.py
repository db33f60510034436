"""Families in llama.cpp itself: its next-token probabilities are those of transformers' modules on the same weights."""

from pathlib import Path

import numpy as np
import pytest

from streamquant.model.forward import Setting
from streamquant.model.variants.open import open_variant
from streamquant.validate.engines.agreement import engine_agreement
from streamquant.validate.engines.check import last_logits
from streamquant.validate.engines.process import EngineProcess
from tests.peers import requires_llama_cpp
from tests.small_models import Models

LARGEST = 1e-5
"""Of the divergence of one prompt; both sides compute in float32."""


def divergence(source: Path, gguf: Path) -> float:
    """The largest divergence of llama.cpp's probabilities from those of a checkpoint, over some prompts."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 250, length).tolist() for length in (8, 32, 64)]
    logits = last_logits(open_variant(source), prompts, Setting())
    with EngineProcess(gguf) as engine:
        return engine_agreement(engine, prompts, logits).max_kld


@requires_llama_cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["glm", "glm-plain", "qwen2-moe", "dots1", "olmoe"])
def test_llama_cpp_agrees(models: Models, case: str) -> None:
    assert divergence(models.checkpoint(case), models.gguf(case, "F32")) < LARGEST


@requires_llama_cpp
def test_another_model_would_show(models: Models) -> None:
    """The proof that the comparison can fail: experts are weighted by half."""
    other = models.checkpoint("glm", routed_scaling_factor=0.75)
    assert divergence(other, models.gguf("glm", "F32")) > 10 * LARGEST
