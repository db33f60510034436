"""What a release plans with before its importance matrix is there has the names and lengths of the real one."""

from pathlib import Path

import pytest

from streamquant.calibrate.importance import ImportanceOptions, write_importance
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.corpus import read_corpus
from streamquant.model.forward import Setting
from streamquant.model.variants.open import open_variant
from streamquant.publish.release.release_file import ReleaseImatrix
from streamquant.publish.release.stages.imatrix import expected_imatrix
from tests.small_models import Models


@pytest.mark.parametrize("case", ["llama3.1", "qwen3-moe", "mixtral", "glm"])
def test_names_and_lengths(models: Models, case: str, tmp_path: Path) -> None:
    folder = models.checkpoint(case)
    text = tmp_path / "text.txt"
    text.write_text("some words of a text, and more of them. " * 200)
    corpus = read_corpus([text], folder, context=64, chunks=3)
    write_importance(open_variant(folder), corpus, tmp_path / "i.gguf", ImportanceOptions(Setting()))
    found = read_imatrix(tmp_path / "i.gguf")
    expected = expected_imatrix(open_checkpoint(folder), "i.gguf", ReleaseImatrix(text=(text,)))
    assert {name: entry.size for name, entry in expected.entries.items()} == {
        name: entry.size for name, entry in found.entries.items()
    }
