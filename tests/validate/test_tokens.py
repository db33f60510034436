import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue
from tokenizers import Tokenizer

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.text.tokens import TORTURE, check_token_types, compare_tokens, special_texts
from tests.peers import requires_llama_cpp, vectors
from tests.validate.engine_fixtures import Model, with_keys

pytestmark = requires_llama_cpp


def text_of(data: Path) -> list[str]:
    return [
        (data / "text" / "calibration" / f"{name}.utf8").read_text()[:20000] for name in ("multilingual", "technical")
    ]


def test_the_torture_strings_can_be_sent() -> None:
    texts = [text for group in TORTURE.values() for text in group]
    assert len(texts) > 100
    assert "\0" not in "".join(texts)
    assert "".join(texts).encode()
    assert any("\u200d" in text for text in TORTURE["emoji"])
    assert max(map(len, texts)) > 10000


def test_hermes_llama(llama_source: EngineProcess, llama_gguf: EngineProcess, data: Path) -> None:
    special = llama_source.special_tokens()
    assert len(special) == 256
    report = compare_tokens(llama_source, llama_gguf, special, {"calibration": text_of(data)})
    assert report.problems == ()
    assert report.different == 0
    assert report.texts > 3000
    assert json.loads(json.dumps(asdict(report)))["groups"]


@pytest.mark.long
def test_hermes_14b(qwen_source: EngineProcess, qwen_gguf: EngineProcess, data: Path) -> None:
    report = compare_tokens(qwen_source, qwen_gguf, qwen_source.special_tokens(), {"calibration": text_of(data)})
    assert report.problems == ()
    causes = {item.cause for group in report.groups for item in group.first}
    # llama.cpp does not normalize to NFC, and types fill-in-the-middle tokens and </s> by their text
    assert len(causes) == 2
    assert None not in causes


def test_llama_cpp_own_vectors_in_both(llama_source: EngineProcess, llama_gguf: EngineProcess) -> None:
    texts, ids = zip(*vectors("llama-bpe"), strict=True)
    for engine in (llama_source, llama_gguf):
        assert tuple(engine.tokenize(texts, add_special=False, parse_special=False)) == ids


def test_special_parsing_switches(llama_source: EngineProcess, llama_gguf: EngineProcess) -> None:
    assert (llama_source.facts.bos, llama_source.facts.adds_bos) == ("<|begin_of_text|>", True)
    for engine in (llama_source, llama_gguf):
        (parsed,) = engine.tokenize(["<|eot_id|><think>"], add_special=True, parse_special=True)
        (plain,) = engine.tokenize(["<|eot_id|><think>"], add_special=False, parse_special=False)
        assert parsed == (128000, 128009, 128002)
        assert 128009 not in plain
        assert plain[-1] == 128002
        assert engine.detokenize([parsed]) == ["<|begin_of_text|><|eot_id|><think>"]


def planted(model: Model, fault: str) -> dict[str, GGUFValue | None]:
    metadata = model.metadata
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    merges = list(metadata["tokenizer.ggml.merges"])
    at = {text: number for number, text in enumerate(tokens)}
    if fault == "BOS flag":
        return {"tokenizer.ggml.add_bos_token": GGUFValue(False, GGUFValueType.BOOL)}
    if fault == "pre-tokenizer":
        return {"tokenizer.ggml.pre": GGUFValue("gpt-2", GGUFValueType.STRING)}
    if fault == "merges":
        random.Random(0).shuffle(merges)
        return {"tokenizer.ggml.merges": GGUFValue(merges, GGUFValueType.ARRAY, GGUFValueType.STRING)}
    if fault == "type to NORMAL":
        types[at["<tool_call>"]] = int(TokenType.NORMAL)
    else:
        types[at["<tool_call>"]] = int(TokenType.CONTROL)
    return {"tokenizer.ggml.token_type": GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32)}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("BOS flag", "BOS and EOS added"),
        pytest.param("pre-tokenizer", "digits", marks=pytest.mark.long),
        pytest.param("merges", "words", marks=pytest.mark.long),
        pytest.param("type to NORMAL", "'<tool_call>'", marks=pytest.mark.long),
        ("type to CONTROL", "special tokens as text"),
    ],
)
def test_planted_faults_are_found(
    fault: str, named: str, llama_source: EngineProcess, hermes_llama: Model, tmp_path: Path
) -> None:
    broken = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", planted(hermes_llama, fault))
    tags = [token for token in llama_source.special_tokens() if not token[2]]
    with EngineProcess(broken, tokenizer_only=True) as variant:
        report = compare_tokens(llama_source, variant, tags)
    assert not report.agrees
    assert any(named in problem for problem in report.problems), report.problems
    if fault.startswith("type"):
        assert all("<tool_call" in problem or "special" in problem for problem in report.problems)


def test_the_ids_around_the_first_difference(llama_source: EngineProcess, hermes_llama: Model, tmp_path: Path) -> None:
    broken = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", planted(hermes_llama, "type to CONTROL"))
    with EngineProcess(broken, tokenizer_only=True) as variant:
        report = compare_tokens(llama_source, variant, [(128011, "<tool_call>", False)])
    (group,) = [item for item in report.groups if item.name == "special tokens in context" and item.different]
    assert (group.texts, group.different, group.known, group.parse_special) == (3, 2, 0, False)
    first = group.first[0]
    assert (first.text, first.at, first.expected[:2]) == ("a<tool_call>b", 1, (64, 128011))
    assert first.found_text == "a<tool_call>b"


def test_special_texts_of_nothing() -> None:
    assert special_texts([]) == {"special tokens alone": [], "special tokens in context": []}


def test_types_and_texts_of_added_tokens(
    llama_source: EngineProcess, hermes_llama: Model, hermes_14b: Model, data: Path, tmp_path: Path
) -> None:
    special = llama_source.special_tokens()
    assert check_token_types(hermes_llama.gguf, special) == ()
    qwen = json.loads((data / "tokenizers" / "hermes4-14b" / "tokenizer.json").read_text())["added_tokens"]
    assert check_token_types(hermes_14b.gguf, [(item["id"], item["content"], item["special"]) for item in qwen]) == ()
    metadata = hermes_llama.metadata
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    types[128009], tokens[128003] = int(TokenType.NORMAL), "</thought>"
    keys = {
        "tokenizer.ggml.token_type": GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.tokens": GGUFValue(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
    }
    assert check_token_types(with_keys(hermes_llama.gguf, tmp_path / "x.gguf", keys), special) == (
        "'</think>' (128003): the file has '</thought>' in its place",
        "'<|eot_id|>' (128009): type CONTROL expected, NORMAL found",
    )
    assert "only 128256 tokens" in check_token_types(hermes_llama.gguf, [(200000, "<x>", True)])[0]


def test_a_class_that_does_not_follow_tokenizer_json_is_no_fault_of_the_file(smollm2: Path, tmp_path: Path) -> None:
    """transformers 5 leaves out the Digits pre-tokenizer of a GPT2Tokenizer; llama.cpp's ids are tokenizer.json's."""
    convert(make_plan(open_checkpoint(smollm2), parse_variants(["gguf:Q4_0"])), tmp_path, RunOptions(jobs=2))
    (gguf,) = tmp_path.rglob("*.gguf")
    text = "\n\n1"
    with EngineProcess(smollm2, tokenizer_only=True) as source, EngineProcess(gguf, tokenizer_only=True) as variant:
        ways = {"add_special": False, "parse_special": True}
        expected = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        assert list(variant.tokenize([text], **ways)[0]) == expected
        if list(source.tokenize([text], **ways)[0]) == expected:
            pytest.skip("this version of transformers follows tokenizer.json")
        report = compare_tokens(source, variant, [], {"text": [text]})
    assert report.problems == ()
    (group,) = (group for group in report.groups if group.name == "text" and group.parse_special)
    assert (group.different, group.known) == (1, 1)
    assert "does not follow the original's tokenizer.json" in str(group.first[0].cause)
