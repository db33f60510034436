"""chat-check on files whose keys make llama.cpp take other special tokens than the original has."""

from pathlib import Path

import pytest
from gguf import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.open import open_variant
from streamquant.validate.validation import chat_check
from tests import synthetic
from tests.peers import requires_llama_cpp
from tests.tokenizer_folders import chat_like
from tests.validate.engine_fixtures import with_keys

pytestmark = requires_llama_cpp
KEYS = Keys.Tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EOS is a list in config.json, of tokens that llama.cpp does not know by their text; BOS there is none."""
    case = chat_like(tmp_path_factory.mktemp("special") / "tokenizer")
    tokens: list[str] = case.read().metadata[KEYS.LIST].value
    ends = [tokens.index("<|last|>"), tokens.index("<|stop|>")]
    folder = case.folder.parent / "model"
    return synthetic.write_checkpoint(
        folder, tokenizer=case.folder, extra_side_files=False, eos_token_id=ends, bos_token_id=None
    )


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    out = source.parent / "out"
    convert(make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"])), out, RunOptions(jobs=1))
    return next(out.rglob("*.gguf"))


def problems(source: Path, file: Path) -> list[str]:
    (variant,) = chat_check(open_variant(source), [file]).variants
    return [problem.what for problem in variant.problems if problem.check == "special-tokens"]


def number(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)


def test_a_good_file_has_no_problem(source: Path, good: Path) -> None:
    assert problems(source, good) == []


def test_keys_that_the_converter_leaves_out_are_missed(source: Path, good: Path, tmp_path: Path) -> None:
    """Without them llama.cpp ends every answer at the first comma."""
    bare = with_keys(good, tmp_path / "x.gguf", {KEYS.EOS_ID: None, KEYS.EOT_ID: None})
    eos, ends = problems(source, bare)
    assert eos.startswith("EOS: llama.cpp has ',' (11), the original ")
    assert "the original ends at '<|last|>'" in ends
    assert "'<|stop|>'" in ends
    assert ends.endswith("llama.cpp goes on")


def test_other_faults_are_named(source: Path, good: Path, tmp_path: Path) -> None:
    added = {KEYS.ADD_BOS: GGUFValue(True, GGUFValueType.BOOL)}
    (bos,) = problems(source, with_keys(good, tmp_path / "bos.gguf", added))
    assert bos == "BOS before a text: llama.cpp adds it, the original does not"
    (eot,) = problems(source, with_keys(good, tmp_path / "eot.gguf", {KEYS.EOT_ID: number(5)}))
    assert "the original ends at '<|last|>'" in eot
