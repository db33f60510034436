"""The comparison as a whole: what it says of good variants, that planted faults are named, the cache, the texts."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures.tensor_view import resolve, rope_view
from streamquant.model.corpus import Corpus, read_corpus
from streamquant.model.forward import Setting
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.logits.comparison import Comparison, ComparisonOptions, compare
from streamquant.validate.logits.hidden_states import layer_error, sample_positions
from tests.conftest import read_safetensors
from tests.model.test_variant import rewrite_shard
from tests.small_models import Models, edit_gguf

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(900)]

SETTING = Setting(batch_tokens=128)
CASE = "llama3.1"


def write_texts(folder: Path) -> list[Path]:
    words = ["the", "thin", "letter", "ten", "tin", "in", "a", "\n"]
    paths = []
    for seed, name in enumerate(("prose", "code")):
        draw = np.random.default_rng(seed)
        path = folder / f"{name}.txt"
        path.write_text(" ".join(draw.choice(words, 400).tolist()))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def corpus(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    return read_corpus(texts, models.checkpoint(CASE), context=64, chunks=3)


@pytest.fixture(scope="module")
def result(models: Models, corpus: Corpus) -> Comparison:
    """One comparison of good variants, with both noise floors."""
    kinds = ("F32", "BF16", "Q8_0", "Q4_K_M")
    variants = [open_variant(models.gguf(CASE, kind)) for kind in kinds]
    variants.append(open_variant(models.fp8(CASE)))
    return compare(
        open_variant(models.checkpoint(CASE)), variants, corpus, ComparisonOptions(SETTING, ("dtype", "batch"))
    )


# --- good variants --------------------------------------------------------------------------------------------------


def test_more_bits_diverge_less(result: Comparison) -> None:
    klds = [variant.overall.kld.value for variant in result.variants]
    f32, bf16, q8, q4, fp8 = klds
    assert 0 <= f32 < 1e-9
    assert f32 < bf16 < q8 < fp8 < q4
    assert [variant.problems for variant in result.variants] == [()] * 5
    assert result.variants[0].overall.same_top.value == 1
    assert [variant.activations_emulated for variant in result.variants] == [False, True, True, True, True]


def test_errors_of_tensors_and_layers(result: Comparison) -> None:
    f32, bf16, q8, q4, fp8 = result.variants
    for variant in (f32, bf16):
        assert {error.sqnr_db for error in variant.tensors} == {None}
        assert {error.max_error for error in variant.tensors} == {0}
    for variant, low, high in ((q8, 40, 50), (fp8, 30, 33), (q4, 18, 48)):
        quantized = [error.sqnr_db for error in variant.tensors if error.sqnr_db is not None]
        assert len(quantized) >= 21
        assert low < min(quantized) <= max(quantized) < high
        assert [error.name for error in variant.tensors] == list(open_variant(Path(variant.model.path)).tensors)
    for variant in result.variants:
        assert [error.layer for error in variant.layers] == [-1, 0, 1, 2]
    assert q8.layers[-1].relative_error < q4.layers[-1].relative_error
    assert 0.9 < q4.layers[-1].cosine < q8.layers[-1].cosine <= 1
    assert f32.layers[-1].relative_error < 1e-5


def test_categories_are_the_texts(result: Comparison, corpus: Corpus) -> None:
    variant = result.variants[2]
    assert list(variant.by_category) == list(result.original.by_category) == ["prose", "code"]
    parts = list(variant.by_category.values())
    assert sum(part.tokens for part in parts) == variant.overall.tokens == result.scored_tokens == 6 * 31
    mean = np.mean([part.kld.value for part in parts])
    assert variant.overall.kld.value == pytest.approx(mean)
    assert variant.overall.kld.value == pytest.approx(np.mean(variant.chunk_kld))
    assert result.scored_positions == (32, 63)
    assert (result.chunks, result.context, result.corpus_sha256) == (6, 64, corpus.sha256())


def test_noise_floors(result: Comparison) -> None:
    dtype, batch = result.noise_floors
    assert (dtype.kind, batch.kind) == ("dtype", "batch")
    assert 1e-9 < dtype.overall.kld.value < 1e-3
    assert batch.overall.kld.value < 1e-9
    assert "bf16" in dtype.what
    assert "1 chunks at a time against 2" in batch.what


def test_the_result_is_plain_json(result: Comparison) -> None:
    kept = json.loads(json.dumps(dataclasses.asdict(result), default=str, allow_nan=False))
    assert kept["variants"][2]["overall"]["kld"]["value"] == result.variants[2].overall.kld.value
    assert kept["effort"]["models"] == 8
    assert kept["effort"]["bytes_read"] > 0
    assert result.variants[3].model.types[0].stored_as == "Q4_K"


def test_perplexity_is_that_of_transformers(result: Comparison, models: Models, corpus: Corpus) -> None:
    import torch

    from streamquant.model.forward import all_logits

    logits = all_logits(open_variant(models.checkpoint(CASE)), corpus.tokens, SETTING).double()
    nll = -logits[:, 32:63].log_softmax(-1).gather(-1, torch.from_numpy(corpus.tokens[:, 33:64, None]))
    assert result.original.overall.nll.value == pytest.approx(float(nll.mean()), rel=1e-7)


# --- planted faults -------------------------------------------------------------------------------------------------


def named(check: str) -> Callable[[Comparison], set[str | None]]:
    return lambda found: {p.where for p in found.variants[0].problems if p.check == check and p.severity == "error"}


def double_scale_of_one_block(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Q8_0: 34 bytes a block, the FP16 scale first; its exponent plus one."""
    edited = raw.copy()
    edited[17, 34 * 3 + 1] += 4
    return edited


def unpermuted(raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return raw[resolve(rope_view(8, 1), (len(raw),)).to]


@pytest.mark.parametrize(
    ("fault", "check", "where"),
    [
        ("rows", "tensor", "model.layers.1.self_attn.q_proj.weight"),
        ("scale", "block", "model.layers.1.mlp.up_proj.weight"),
        ("swapped", "tensor", "model.layers.0.mlp.up_proj.weight"),
        ("rope_freqs", "rope", "frequency"),
        ("theta", "rope", "frequency"),
        ("eps", "hyperparameters", None),
    ],
)
def test_a_fault_is_named(
    models: Models, corpus: Corpus, tmp_path: Path, fault: str, check: str, where: str | None
) -> None:
    source = models.gguf(CASE, "Q8_0")
    stored = {t.name: np.array(t.data) for t in __import__("gguf").GGUFReader(source).tensors}
    edits: dict[str, dict[str, Any]] = {
        "rows": {"tensors": {"blk.1.attn_q.weight": unpermuted}},
        "scale": {"tensors": {"blk.1.ffn_up.weight": double_scale_of_one_block}},
        "swapped": {
            "tensors": {
                "blk.0.ffn_up.weight": lambda _raw: stored["blk.0.ffn_gate.weight"],
                "blk.0.ffn_gate.weight": lambda _raw: stored["blk.0.ffn_up.weight"],
            }
        },
        "rope_freqs": {"tensors": {"rope_freqs.weight": None}},
        "theta": {"keys": {"llama.rope.freq_base": GGUFValue(10000.0, GGUFValueType.FLOAT32)}},
        "eps": {"keys": {"llama.attention.layer_norm_rms_epsilon": GGUFValue(1e-3, GGUFValueType.FLOAT32)}},
    }
    path = edit_gguf(source, tmp_path / "model-Q8_0.gguf", **edits[fault])
    original = open_variant(models.checkpoint(CASE))
    found = compare(original, [open_variant(path)], corpus, ComparisonOptions(SETTING))
    places = named(check)(found)
    assert places, found.variants[0].problems
    assert where is None or any(where in str(place) for place in places)
    assert {problem.check for problem in found.variants[0].problems} == {check}, "nothing else is blamed"


def test_one_wrong_scale_in_fp8_is_named(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    source = models.fp8(CASE)
    folder = tmp_path / "fp8"
    shutil.copytree(source, folder)
    path = next(p for p in sorted(folder.glob("*.safetensors")) if SCALE in read_safetensors(p))
    only = tmp_path / "only"
    only.mkdir()
    path.rename(only / path.name)

    def double(tensors: dict[str, Any]) -> None:
        dtype, shape, raw = tensors[SCALE]
        edited = bytearray(raw)
        edited[2 * 9 + 1] += 1  # BF16: two to the power of two more
        tensors[SCALE] = dtype, shape, bytes(edited)

    rewrite_shard(only, double)
    (only / path.name).rename(path)
    found = compare(open_variant(models.checkpoint(CASE)), [open_variant(folder)], corpus, ComparisonOptions(SETTING))
    assert any("layers.2.mlp.down_proj" in str(place) for place in named("tensor")(found) | named("block")(found))


SCALE = "model.layers.2.mlp.down_proj.weight_scale"


def test_another_vocabulary_cannot_be_compared(models: Models, corpus: Corpus) -> None:
    other = open_variant(models.checkpoint("qwen3", vocab_size=640))
    with pytest.raises(StreamquantError, match="another vocabulary"):
        compare(open_variant(models.checkpoint(CASE)), [other], corpus, ComparisonOptions(SETTING))


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_original_is_computed_once(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    def run(setting: Setting = SETTING, tokens: Corpus = corpus) -> Comparison:
        original, variant = open_variant(models.checkpoint(CASE)), open_variant(models.gguf(CASE, "Q8_0"))
        return compare(original, [variant], tokens, ComparisonOptions(setting, cache=tmp_path))

    first = run()
    assert not first.effort.original_cached
    second = run()
    assert second.effort.original_cached
    assert second.variants[0].overall == first.variants[0].overall
    assert second.variants[0].layers == first.variants[0].layers
    assert second.original.overall == first.original.overall
    assert second.effort.bytes_read < first.effort.bytes_read
    assert not run(dataclasses.replace(SETTING, dtype="bf16")).effort.original_cached
    other = Corpus(corpus.tokens[:4] + 0, (dataclasses.replace(corpus.files[0], chunks=4),), corpus.bos)
    assert not run(tokens=other).effort.original_cached
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    again = run()
    assert not again.effort.original_cached, "a damaged file is computed anew"
    assert again.variants[0].overall == first.variants[0].overall


# --- the texts ------------------------------------------------------------------------------------------------------


def test_chunks_begin_with_bos_where_the_tokenizer_adds_it(data: Path, tmp_path: Path) -> None:
    text = data / "text" / "tinystories_sample.txt"
    llama = read_corpus([text], data / "tokenizers" / "hermes4-llama", context=64)
    qwen = read_corpus([text], data / "tokenizers" / "hermes4-14b", context=64)
    assert llama.bos is not None
    assert set(llama.tokens[:, 0].tolist()) == {llama.bos}
    assert qwen.bos is None
    assert len(set(qwen.tokens[:, 0].tolist())) > 3
    # the chunk's first token is replaced, the others stay where they were: BOS counts as the text's first token
    assert llama.tokens[1, 1:5].tolist() != llama.tokens[0, 1:5].tolist()
    assert llama.files[0].tokens // 64 == llama.files[0].chunks == len(llama.tokens)


def test_special_tokens_in_a_text_are_text(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|im_start|> <|endoftext|> word " * 40)
    corpus = read_corpus([tmp_path / "a.txt"], data / "tokenizers" / "hermes4-14b", context=32)
    assert int(corpus.tokens.max()) < 151643, "the first special token of Qwen's vocabulary"


def test_texts_that_cannot_be_used(models: Models, tmp_path: Path) -> None:
    tokenizer = models.checkpoint(CASE)
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("the end")
    latin.write_bytes(b"caf\xe9 " * 500)
    with pytest.raises(UsageError, match="too short"):
        read_corpus([short], tokenizer)
    with pytest.raises(StreamquantError, match=r"not UTF-8[\s\S]*byte 3"):
        read_corpus([latin], tokenizer)
    with pytest.raises(StreamquantError, match="cannot read a text"):
        read_corpus([tmp_path / "none.txt"], tokenizer)
    with pytest.raises(UsageError, match="no tokenizer"):
        read_corpus([short], tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="one name"):
        read_corpus([short, tmp_path / "b" / "short.txt"], tokenizer)
    with pytest.raises(UsageError, match="nothing to score"):
        read_corpus([], tokenizer)


# --- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_scored_positions() -> None:
    positions = sample_positions(3, 64, 10)
    assert len(positions) == 10
    assert all(32 <= position % 64 < 63 for position in positions)
    assert {position // 64 for position in positions} == {0, 1, 2}
    assert len(sample_positions(1, 8, 100)) == 3


def test_layer_error_by_hand() -> None:
    import torch

    found = layer_error(4, torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    assert found.layer == 4
    assert found.relative_error == pytest.approx(2**0.5 / 2)
    assert found.cosine == pytest.approx(0.5)
