"""Folders whose tokenizer files do not say the same: tokenizer.model, tokenizer.json, added_tokens.json ..."""

import json
import pathlib

import pytest
from gguf import Keys, TokenType

from streamquant.quant.errors import StreamquantError
from tests.peers import (
    Job,
    converter_vocab_kvs,
    llama_cpp_ids,
    requires_converter,
    requires_llama_cpp,
    spelled,
    write_tiny_gguf,
)
from tests.tokenizer_folders import (
    TEXT,
    Case,
    chat_like,
    edit,
    llama3_like,
    sentencepiece_model,
    two_tokenizers,
)  # fmt: skip

KEYS = Keys.Tokenizer
CHATML = ("<|im_start|>", "<|im_end|>")
CONTROL, USER_DEFINED = int(TokenType.CONTROL), int(TokenType.USER_DEFINED)


def typed(case: Case) -> dict[str, tuple[int, int]]:
    """Text -> id and type."""
    keys = case.read().metadata
    pairs = zip(keys[KEYS.LIST].value, keys[KEYS.TOKEN_TYPE].value, strict=True)
    return {text: (number, kind) for number, (text, kind) in enumerate(pairs)}


def write_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_added_tokens_of_tokenizer_json_are_laid_over_tokenizer_model(tmp_path: pathlib.Path) -> None:
    case = two_tokenizers(tmp_path / "x", CHATML, eos_token="<|im_end|>")
    read, tokens = case.read(), typed(case)
    assert [tokens[text] for text in CHATML] == [(350, CONTROL), (351, CONTROL)]
    assert read.metadata[KEYS.EOS_ID].value == 351
    assert read.metadata[KEYS.SCORES].value[350:] == [-1000.0] * 2 + [-10000.0] * 3
    assert any(note.startswith("2 added tokens of tokenizer.json that tokenizer.model has not") for note in read.notes)


@requires_llama_cpp
def test_llama_cpp_has_the_ids_of_tokenizer_json(tmp_path: pathlib.Path) -> None:
    from tokenizers import Tokenizer

    case = two_tokenizers(tmp_path / "x", CHATML)
    write_tiny_gguf(tmp_path / "model.gguf", case.read().metadata)
    texts = [TEXT, "<|im_start|>user the fox<|im_end|>"]
    backend = Tokenizer.from_file(str(case.folder / "tokenizer.json"))
    # llama.cpp puts a space after a special token, the normalizer Prepend of tokenizer.json does too.
    expected = [list(backend.encode(text, add_special_tokens=False).ids) for text in texts]
    assert llama_cpp_ids(tmp_path / "model.gguf", texts) == expected


@requires_converter
def test_equals_the_converter_where_both_files_say_the_same(tmp_path: pathlib.Path) -> None:
    """With the tokens in added_tokens_decoder too, as transformers 4 saves them, and without any."""
    decoder = {
        str(number): {"content": text, "special": True}
        for number, text in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (350, CHATML[0]), (351, CHATML[1])]
    }
    cases = [
        two_tokenizers(tmp_path / "decoder", CHATML, added_tokens_decoder=decoder, eos_token="<|im_end|>"),
        two_tokenizers(tmp_path / "plain", eos_token="</s>"),
        two_tokenizers(tmp_path / "lost", CHATML, eos_token="<|im_end|>"),
    ]
    equal, plain, lost = converter_vocab_kvs([Job(case.folder) for case in cases])
    for case, reference in zip(cases, (equal, plain), strict=False):
        assert spelled(case.read().metadata) == {key: v for key, v in reference.items() if key.startswith("tokenizer.")}
    assert lost[KEYS.LIST][1][350:352] == ["[PAD350]", "[PAD351]"]  # the reason for the deviation


@pytest.mark.parametrize("kind", ["byte-level", "another vocabulary"])
def test_tokenizer_json_wins_over_another_models_tokenizer_model(tmp_path: pathlib.Path, kind: str) -> None:
    """transformers reads tokenizer.json; the converter would take tokenizer.model."""
    base = two_tokenizers(tmp_path / "base")
    case = llama3_like(tmp_path / "x") if kind == "byte-level" else two_tokenizers(tmp_path / "x")
    if kind != "byte-level":
        swap = ("▁fox", "▁the") if {"▁fox", "▁the"} <= typed(base).keys() else ("e", "o")
        edit(case.folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(
            {swap[0]: t["model"]["vocab"][swap[1]], swap[1]: t["model"]["vocab"][swap[0]]}))  # fmt: skip
    before = {key: value for key, value in case.read().metadata.items() if kind == "byte-level"}
    (case.folder / "tokenizer.model").write_bytes((base.folder / "tokenizer.model").read_bytes())
    read = case.read()
    reason = "tokenizer.json is byte-level BPE" if kind == "byte-level" else "2 ids have other tokens in tokenizer.json"
    assert any(
        note.startswith(f"WARNING: tokenizer.model is not used, as in transformers: {reason}") for note in read.notes
    )
    if kind == "byte-level":
        assert read.metadata == before
    else:
        vocab = json.loads((case.folder / "tokenizer.json").read_text())["model"]["vocab"]
        assert {text: read.metadata[KEYS.LIST].value[number] for text, number in vocab.items()} == {t: t for t in vocab}


def test_added_tokens_json_is_read_where_transformers_reads_it(tmp_path: pathlib.Path) -> None:
    case = chat_like(tmp_path / "x", eos_token="<|stop|>", additional_special_tokens=["<|more|>"])
    count = len(json.loads((case.folder / "tokenizer.json").read_text())["model"]["vocab"]) + 5
    write_json(case.folder / "added_tokens.json", {"<plain>": count, "<|more|>": count + 1})
    tokens = typed(case)
    assert (tokens["<plain>"], tokens["<|more|>"]) == ((count, USER_DEFINED), (count + 1, CONTROL))
    assert f"token '<plain>' is only in added_tokens.json: id {count}" in case.read().notes
    write_json(case.folder / "added_tokens.json", {"<plain>": count + 1})
    with pytest.raises(
        StreamquantError, match=r"two tokenizer files disagree\n.*added_tokens.json, '<plain>'\n.*id 406"
    ):
        case.read()
    write_json(case.folder / "added_tokens.json", {"<plain>": "1"})
    with pytest.raises(StreamquantError, match=r"wrong type\n.*added_tokens.json, '<plain>'"):
        case.read()


def test_special_in_tokenizer_json_is_control_whatever_added_tokens_json_says(tmp_path: pathlib.Path) -> None:
    case = two_tokenizers(tmp_path / "x", ("[INST]",))
    write_json(case.folder / "added_tokens.json", {"[INST]": 350})
    assert typed(case)["[INST]"] == (350, CONTROL)


def test_stale_added_tokens_json_beside_a_decoder(tmp_path: pathlib.Path) -> None:
    """transformers does not read it then; the two ids of one text would make llama.cpp refuse the file."""
    case = sentencepiece_model(tmp_path / "x")
    write_json(case.folder / "added_tokens.json", {"<|call|>": 410, "<extra>": 402})
    tokens = typed(case)
    assert (tokens["<|call|>"][0], tokens["<extra>"][0]) == (400, 402)


def test_tekken_json_without_tokenizer_json_is_refused(tmp_path: pathlib.Path) -> None:
    case = sentencepiece_model(tmp_path / "x")
    write_json(case.folder / "tekken.json", {})
    with pytest.raises(StreamquantError, match=r"no tokenizer\n.*\n.*tekken.json\n(.*\n)*.*save_pretrained"):
        case.read()
    beside = chat_like(tmp_path / "y")
    write_json(beside.folder / "tekken.json", {})
    assert beside.read()
