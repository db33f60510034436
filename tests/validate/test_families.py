"""Families in llama.cpp itself: its next-token probabilities are those of transformers' modules on the same weights."""

import pytest

from tests.family_checks import LARGEST_DIVERGENCE, divergence
from tests.peers import requires_llama_cpp
from tests.small_models import Models


@requires_llama_cpp
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["glm", "glm-plain", "qwen2-moe", "dots1", "olmoe"])
def test_llama_cpp_agrees(models: Models, case: str) -> None:
    assert divergence(models.checkpoint(case), models.gguf(case, "F32")) < LARGEST_DIVERGENCE


@requires_llama_cpp
def test_another_model_would_show(models: Models) -> None:
    """The proof that the comparison can fail: experts are weighted by half."""
    other = models.checkpoint("glm", routed_scaling_factor=0.75)
    assert divergence(other, models.gguf("glm", "F32")) > 10 * LARGEST_DIVERGENCE
