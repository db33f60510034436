"""Importance matrices: sums against transformers' own activations and llama-imatrix, resuming, the file format."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from streamquant.calibrate.importance import ImportanceOptions, InputSums, write_importance
from streamquant.convert.architectures import TensorKind, TensorRule
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.files.gguf_file import read_header
from streamquant.files.reading import read_bytes
from streamquant.model.corpus import Corpus, read_corpus
from streamquant.model.forward import Setting
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError
from tests.small_models import Models, edit_gguf
from tests.validate.test_comparison import CASE, write_texts

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(900)]

SETTING = Setting(batch_tokens=128)
OPTIONS = ImportanceOptions(SETTING)


@pytest.fixture(scope="module")
def corpus(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    return read_corpus(texts, models.checkpoint(CASE), context=64, chunks=3)


def sums_of_transformers(folder: Path, tokens: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Module name -> sum of squares of its input, all layers in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def before(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            sums[name] = arguments[0].double().square().sum((0, 1)).numpy()

        module.register_forward_pre_hook(before)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            watch(name, module)
    with torch.inference_mode():
        model(torch.from_numpy(tokens))
    return sums


def test_sums_are_those_of_transformers(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    variant = open_variant(models.checkpoint(CASE))
    run = write_importance(variant, corpus, tmp_path / "imatrix.gguf", OPTIONS)
    assert (run.chunks, run.resumed_from, run.entries) == (6, 0, 21)
    found = read_imatrix(tmp_path / "imatrix.gguf")
    assert found.chunk_count == 6
    assert found.datasets == ("prose.txt", "code.txt")
    expected = sums_of_transformers(models.checkpoint(CASE), corpus.tokens)
    names = {rule.hf_name.removesuffix(".weight"): rule.gguf_name for rule in variant.description.rules.values()}
    assert found.entries.keys() == {names[name] for name in expected}
    for name, sums in expected.items():
        assert np.allclose(found.entries[names[name]], sums / corpus.tokens.size, rtol=2e-6), name


def test_resuming_gives_the_same_sums(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    variant = open_variant(models.checkpoint(CASE))
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    write_importance(variant, corpus, whole, OPTIONS)
    half = dataclasses.replace(corpus, tokens=corpus.tokens[:2])
    write_importance(variant, half, parts, OPTIONS)
    run = write_importance(variant, corpus, parts, ImportanceOptions(SETTING, save_every=3))
    assert (run.chunks, run.resumed_from) == (6, 2)
    a, b = read_imatrix(whole), read_imatrix(parts)
    assert b.chunk_count == 6
    for name, sums in a.entries.items():
        assert np.allclose(sums, b.entries[name], rtol=2e-6), name
    again = write_importance(variant, corpus, parts, OPTIONS)
    assert (again.chunks, again.resumed_from, again.bytes_read) == (6, 6, 0)


def test_a_file_of_other_texts_is_not_continued(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    variant, path = open_variant(models.checkpoint(CASE)), tmp_path / "imatrix.gguf"
    write_importance(variant, dataclasses.replace(corpus, tokens=corpus.tokens[1:3]), path, OPTIONS)
    before = path.read_bytes()
    with pytest.raises(StreamquantError, match="not the beginning"):
        write_importance(variant, corpus, path, OPTIONS)
    assert path.read_bytes() == before
    model = models.gguf(CASE, "Q8_0")
    with pytest.raises(StreamquantError, match="not the beginning"):
        write_importance(variant, corpus, Path(shutil_copy(model, tmp_path / "model.gguf")), OPTIONS)


@pytest.mark.parametrize("what", ["in_sum2", "counts"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -1.0, 3.0])
def test_sums_that_no_run_has_written_are_not_continued(
    what: str, number: float, models: Models, corpus: Corpus, tmp_path: Path
) -> None:
    variant, path, half = open_variant(models.checkpoint(CASE)), tmp_path / "a.gguf", corpus.tokens[:2]
    write_importance(variant, dataclasses.replace(corpus, tokens=half), path, OPTIONS)

    def forged(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        values = raw.view(np.float32).copy()
        values[0] = number
        return values.view(np.uint8)

    wrong = edit_gguf(path, tmp_path / "b.gguf", tensors={f"blk.0.attn_q.weight.{what}": forged})
    if (what, number) == ("in_sum2", 3.0):  # a number like any other
        assert write_importance(variant, corpus, wrong, OPTIONS).resumed_from == 2
        return
    before = wrong.read_bytes()
    with pytest.raises(StreamquantError, match="sums that no run has written"):
        write_importance(variant, corpus, wrong, OPTIONS)
    assert wrong.read_bytes() == before


def test_a_file_without_all_sums_is_not_continued(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    variant, path, half = open_variant(models.checkpoint(CASE)), tmp_path / "a.gguf", corpus.tokens[:2]
    write_importance(variant, dataclasses.replace(corpus, tokens=half), path, OPTIONS)
    for name, edit in {
        "blk.0.attn_q.weight.in_sum2": None,
        "blk.0.attn_q.weight.counts": lambda raw: raw[:0].view(np.float32),
        "blk.1.ffn_down.weight.in_sum2": lambda raw: raw[:8].view(np.float32),
    }.items():
        wrong = edit_gguf(path, tmp_path / "b.gguf", tensors={name: edit})
        with pytest.raises(StreamquantError, match="of another model"):
            write_importance(variant, corpus, wrong, OPTIONS)


def shutil_copy(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes())
    return target


def test_inputs_are_summed_before_they_are_quantized(models: Models, corpus: Corpus, tmp_path: Path) -> None:
    """llama-imatrix sees the inputs before the dot product rounds them."""
    run = write_importance(open_variant(models.gguf(CASE, "Q8_0")), corpus, tmp_path / "q8.gguf", OPTIONS)
    assert run.entries == 21
    write_importance(open_variant(models.checkpoint(CASE)), corpus, tmp_path / "f32.gguf", OPTIONS)
    a, b = read_imatrix(tmp_path / "q8.gguf"), read_imatrix(tmp_path / "f32.gguf")
    first = "blk.0.attn_q.weight"
    assert np.allclose(a.entries[first], b.entries[first], rtol=0.05)


def test_infinite_inputs_are_an_error() -> None:
    rule = TensorRule("a.weight", "blk.0.attn_q.weight", TensorKind.LINEAR, (1, 2), None, required=True)
    sums = InputSums({"a": rule})
    sums.observe("a", torch.tensor([[[1.0, float("inf")]]]))
    with pytest.raises(StreamquantError, match=r"NaN or infinite[\s\S]*column 1"):
        sums.check()


def test_special_tokens_in_texts(models: Models, tmp_path: Path) -> None:
    """As letters with a note, or as the tokens that they are."""
    text = tmp_path / "chat.txt"
    text.write_text("<|im_start|>user\nHi<|im_end|>\n" * 60 + "plain")
    tokenizer = Tokenizer.from_file(str(models.checkpoint(CASE) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plain = read_corpus([text], tmp_path / "tokenizer.json", context=64)
    parsed = read_corpus([text], tmp_path / "tokenizer.json", context=64, parse_special=True)
    start = tokenizer.token_to_id("<|im_start|>")
    assert start not in plain.tokens
    assert plain.plain == {"<|im_start|>": 60, "<|im_end|>": 60}
    assert "60 times" in plain.notes[0]
    assert "--parse-special" in plain.notes[0]
    assert (parsed.plain, parsed.notes) == ({}, ())
    assert (parsed.tokens == start).sum() > 10
    expected = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    first = parsed.tokens[0].tolist()
    assert first[1:] == (expected if parsed.bos is None else [parsed.bos, *expected])[1:64]


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral", "glm"])
def test_every_expert_has_the_sums_of_its_tokens(models: Models, case: str, tmp_path: Path) -> None:
    """What transformers' router sends to each expert: squares of its inputs, and how many there are."""
    from transformers import AutoModelForCausalLM

    folder = models.checkpoint(case)
    corpus = read_corpus(write_texts(tmp_path), folder, context=64, chunks=3)
    write_importance(open_variant(folder), corpus, tmp_path / "imatrix.gguf", OPTIONS)
    header = read_header(tmp_path / "imatrix.gguf")
    stored = {
        tensor.name: read_bytes(tmp_path / "imatrix.gguf", tensor.start, tensor.stop)
        .view(np.float32)
        .reshape(tensor.shape)
        for tensor in header.tensors
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def watch(layer: int, experts: torch.nn.Module) -> None:
        def before(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            expected.setdefault(layer, []).append((arguments[0].clone(), arguments[1].clone()))

        experts.register_forward_pre_hook(before)

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            watch(number, layer.mlp.experts)
    with torch.inference_mode():
        model(torch.from_numpy(corpus.tokens))
    assert len(expected) == (2 if case == "glm" else 3)
    if case == "glm":  # its first layer is dense, the one for multi-token prediction is not computed
        assert stored["blk.1.ffn_down_shexp.weight.counts"].tolist() == [corpus.tokens.size]
        assert "blk.0.ffn_down.weight.counts" in stored
        assert not [name for name in stored if name.startswith("blk.3.")]
    for number, calls in expected.items():
        states, chosen = (torch.cat(found) for found in zip(*calls, strict=True))
        for part in ("gate", "up"):
            name = f"blk.{number}.ffn_{part}_exps.weight"
            for expert in range(5):
                of_expert = states[(chosen == expert).any(-1)]
                assert stored[f"{name}.counts"][expert, 0] == len(of_expert)
                sums = of_expert.double().square().sum(0).numpy()
                assert np.allclose(stored[f"{name}.in_sum2"][expert], sums, rtol=1e-4, atol=1e-6)
        counts = stored[f"blk.{number}.ffn_down_exps.weight.counts"]
        assert counts.sum() == 2 * corpus.tokens.size
        assert len(set(counts.reshape(-1).tolist())) > 1
        assert stored[f"blk.{number}.ffn_gate_inp.weight.counts"].tolist() == [corpus.tokens.size]


def test_experts_that_no_token_reached_are_named(models: Models, tmp_path: Path) -> None:
    """Two tokens reach at most four of five experts."""
    folder = models.checkpoint("qwen3-moe")
    whole = read_corpus(write_texts(tmp_path), folder, context=64, chunks=1)
    short = dataclasses.replace(whole, tokens=whole.tokens[:1, :2])
    run = write_importance(open_variant(folder), short, tmp_path / "imatrix.gguf", OPTIONS)
    (note,) = [note for note in run.notes if note.startswith("WARNING: no token")]
    assert "blk.0 " in note
    assert "blk.2 " in note
