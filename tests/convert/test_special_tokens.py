"""The special tokens of llama.cpp where its converter leaves out a key and the default is wrong."""

import pathlib
from typing import Any

import pytest
from gguf import Keys
from tokenizers import AddedToken

from streamquant.convert.metadata import pretokenizer
from streamquant.convert.metadata.vocabulary_defaults import STOP_TEXTS, EngineTokens, engine_tokens
from streamquant.validate.engines.engine import EngineFacts
from streamquant.validate.engines.process import EngineProcess
from tests.peers import requires_llama_cpp, write_tiny_gguf
from tests.tokenizer_folders import (
    TEMPLATE,
    Case,
    byte_level,
    chat_like,
    edit,
    lead_with,
    sentencepiece_model,
    write_case,
    write_config,
)

KEYS = Keys.Tokenizer


def number_of(case: Case, text: str) -> int:
    tokens: list[str] = case.read().metadata[KEYS.LIST].value
    return tokens.index(text)


def keys_of(case: Case) -> dict[str, Any]:
    return {key: value.value for key, value in case.read().metadata.items()}


def believed(case: Case) -> EngineTokens:
    return engine_tokens(keys_of(case))


def facts(case: Case, tmp_path: pathlib.Path) -> EngineFacts:
    """What llama.cpp itself says of a file with these keys."""
    model = tmp_path / "model.gguf"
    write_tiny_gguf(model, case.read().metadata)
    with EngineProcess(model, tokenizer_only=True) as engine:
        return engine.facts


def write_json(case: Case, name: str, content: str) -> None:
    (case.folder / name).write_text(content)


def test_eos_given_as_a_list_is_the_end_of_a_turn(tmp_path: pathlib.Path) -> None:
    case = chat_like(tmp_path / "x")
    last, stop = number_of(case, "<|last|>"), number_of(case, "<|stop|>")
    write_config(case.folder, "llama", case.vocab_size, eos_token_id=[last, stop])
    keys = keys_of(case)
    assert (keys[KEYS.EOS_ID], keys[KEYS.EOT_ID]) == (stop, last)
    assert KEYS.EOM_ID not in keys


def test_without_a_template_eos_is_the_first_special_token_of_the_list(tmp_path: pathlib.Path) -> None:
    case = chat_like(tmp_path / "x", chat_template=None)
    numbers = [2, number_of(case, "<|third|>"), number_of(case, "<|stop|>")]
    write_config(case.folder, "llama", case.vocab_size, eos_token_id=numbers)
    keys = keys_of(case)
    assert [keys[KEYS.EOS_ID], keys[KEYS.EOT_ID]] == numbers[1:]
    write_config(case.folder, "llama", case.vocab_size, eos_token_id=[2, 3])
    assert keys_of(case)[KEYS.EOS_ID] == 2


def test_generation_config_wins_over_config(tmp_path: pathlib.Path) -> None:
    """LlamaConfig's default of 2 is '#' in a byte-level vocabulary; generate() reads generation_config.json."""
    case = chat_like(tmp_path / "x")
    stop = number_of(case, "<|stop|>")
    write_config(case.folder, "llama", case.vocab_size, eos_token_id=2)
    assert keys_of(case)[KEYS.EOS_ID] == 2
    write_json(case, "generation_config.json", f'{{"eos_token_id": {stop}}}')
    assert keys_of(case)[KEYS.EOS_ID] == stop
    write_json(case, "generation_config.json", f'{{"eos_token_id": [{stop}, 2]}}')
    assert keys_of(case)[KEYS.EOS_ID] == 2
    write_json(case, "generation_config.json", f'{{"eos_token_id": [99999999, {stop}]}}')
    assert keys_of(case)[KEYS.EOS_ID] == stop


def test_every_token_at_which_an_answer_ends_has_a_key(tmp_path: pathlib.Path) -> None:
    case = chat_like(tmp_path / "x", eos_token="<|stop|>")
    numbers = [number_of(case, text) for text in ("<|last|>", "<|stop|>", "<|third|>", "<|fourth|>")]
    write_json(case, "generation_config.json", f'{{"eos_token_id": {numbers}}}')
    keys = keys_of(case)
    last, stop, third, fourth = numbers
    assert (keys[KEYS.EOS_ID], keys[KEYS.EOT_ID], keys[KEYS.EOM_ID]) == (stop, last, third)
    assert f"WARNING: an answer ends at {fourth} '<|fourth|>' too, and GGUF has no key left for it" in case.read().notes


def test_tokens_that_llama_cpp_knows_by_their_text_get_no_key(tmp_path: pathlib.Path) -> None:
    backend = byte_level(pretokenizer._QWEN2, special=("<|endoftext|>", "<|im_end|>"))
    case = write_case(tmp_path / "x", backend, "qwen2", pre=None, eos_token="<|im_end|>")
    write_json(case, "generation_config.json", f'{{"eos_token_id": [{backend.token_to_id("<|endoftext|>")}]}}')
    assert not {KEYS.EOT_ID, KEYS.EOM_ID} & keys_of(case).keys()


@requires_llama_cpp
def test_a_model_without_eos_and_bos_has_none_in_llama_cpp(tmp_path: pathlib.Path) -> None:
    template = "{{ bos_token }}" + TEMPLATE
    case = chat_like(tmp_path / "x", regex=pretokenizer._LLAMA3, chat_template=template, add_eos_token=True)
    found = facts(case, tmp_path)
    assert (found.bos, found.eos, found.adds_bos) == (None, None, False)
    assert not keys_of(case)[KEYS.ADD_EOS]
    assert any(note.startswith("WARNING: no file of the checkpoint names an EOS") for note in case.read().notes)
    full = chat_like(tmp_path / "full", chat_template=template, spare=0)
    assert KEYS.EOS_ID not in keys_of(full)
    warnings = [note for note in full.read().notes if note.startswith("WARNING")]
    assert ["11 ','" in warning for warning in warnings] == [True, True]


def test_bos_that_only_llama_cpp_would_add(tmp_path: pathlib.Path) -> None:
    backend = byte_level(pretokenizer._LLAMA3, ignore_merges=True, special=("<s>", "</s>"))
    case = write_case(tmp_path / "x", backend, "llama", pre=None, bos_token="<s>", eos_token="</s>")
    assert keys_of(case)[KEYS.ADD_BOS] is False
    edit(case.folder / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizerFast"))
    assert KEYS.ADD_BOS not in keys_of(case)  # this class of transformers 4 adds BOS, whatever tokenizer.json says
    lead_with(backend, "<s>")
    case = write_case(tmp_path / "y", backend, "llama", pre=None, bos_token="<s>", eos_token="</s>")
    assert keys_of(case)[KEYS.ADD_BOS] is True


def test_bos_that_is_no_added_token(tmp_path: pathlib.Path) -> None:
    """The converter looks names up among the added tokens alone, and takes config.json's number then."""
    case = chat_like(tmp_path / "x", bos_token="the", eos_token="<|stop|>")
    assert keys_of(case)[KEYS.BOS_ID] == number_of(case, "the") != 11
    write_config(case.folder, "llama", case.vocab_size, bos_token_id=7)
    assert keys_of(case)[KEYS.BOS_ID] == number_of(case, "the")


def test_special_tokens_map_wins_where_transformers_reads_it(tmp_path: pathlib.Path) -> None:
    case = chat_like(tmp_path / "x", eos_token="<|last|>")
    write_json(case, "special_tokens_map.json", '{"eos_token": {"content": "<|stop|>"}, "bos_token": "<|start|>"}')
    keys = keys_of(case)
    stop = number_of(case, "<|stop|>")
    assert (keys[KEYS.EOS_ID], keys[KEYS.BOS_ID]) == (stop, number_of(case, "<|start|>"))
    assert any("special_tokens_map.json and '<|last|>' in tokenizer_config.json" in note for note in case.read().notes)
    decoder = {str(stop): {"content": "<|stop|>", "special": True}}
    edit(case.folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    assert keys_of(case)[KEYS.EOS_ID] == number_of(case, "<|last|>")


def test_sentencepiece_names_its_own_tokens(tmp_path: pathlib.Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    case = sentencepiece_model(tmp_path / "x")
    edit(case.folder / "config.json", lambda c: [c.pop(f"{kind}_token_id") for kind in ("bos", "eos")])
    assert not {KEYS.BOS_ID, KEYS.EOS_ID, KEYS.UNK_ID} & keys_of(case).keys()  # ids 1, 2 and 0, llama.cpp's defaults
    spm.SentencePieceTrainer.train(
        input=str(case.folder / "text"), model_prefix=str(case.folder / "tokenizer"), vocab_size=350, model_type="bpe",
        byte_fallback=True, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=3,
    )  # fmt: skip
    edit(case.folder / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].pop("2"))
    keys = keys_of(case)
    assert (keys[KEYS.EOS_ID], keys[KEYS.UNK_ID], keys[KEYS.BOS_ID]) == (1, 2, 3)


@requires_llama_cpp
@pytest.mark.parametrize("kind", ["none", "bos", "llama3", "sentencepiece"])
def test_engine_tokens_are_those_of_llama_cpp(tmp_path: pathlib.Path, kind: str) -> None:
    """Without our keys: what the module says of llama.cpp's defaults is what llama.cpp says."""
    regex = pretokenizer._LLAMA3 if kind == "llama3" else pretokenizer._QWEN2
    if kind == "sentencepiece":
        case = sentencepiece_model(tmp_path / "x")
    else:
        case = chat_like(tmp_path / "x", regex=regex, bos_token="<|start|>" if kind == "bos" else None)
    ours = (KEYS.EOS_ID, KEYS.EOT_ID, KEYS.ADD_BOS, *(() if kind == "bos" else (KEYS.BOS_ID,)))
    metadata = {key: value for key, value in case.read().metadata.items() if key not in ours}
    plain = {key: value.value for key, value in metadata.items()}
    write_tiny_gguf(tmp_path / "model.gguf", metadata)
    with EngineProcess(tmp_path / "model.gguf", tokenizer_only=True) as engine:
        found, tokens = engine_tokens(plain), plain[KEYS.LIST]
        bos, eos = {"none": (",", ","), "bos": ("<|start|>", ","), "sentencepiece": ("<s>", "</s>")}.get(
            kind, (",", ",")
        )
        assert (tokens[found.bos or 0], tokens[found.eos or 0]) == (bos, eos)
        assert (engine.facts.bos, engine.facts.eos) == (bos, eos)
        assert engine.facts.adds_bos == found.adds_bos == (kind in ("llama3", "sentencepiece"))


def test_stop_texts_are_in_the_engine() -> None:
    """Every text that is taken to end an answer stands in the library of the installed llama.cpp."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = pathlib.Path(xllamacpp.__file__).parent
    libraries = [path.read_bytes() for path in [*folder.rglob("*.so*"), *folder.parent.glob("xllamacpp.libs/*")]]
    assert [text for text in STOP_TEXTS if not any(text.encode() in library for library in libraries)] == []


@requires_llama_cpp
def test_added_token_that_the_vocabulary_lacks(tmp_path: pathlib.Path) -> None:
    """eos_token of tokenizer_config.json alone: transformers adds the token, and so do we."""
    backend = byte_level(pretokenizer._QWEN2, special=("<|start|>",))
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    case = write_case(tmp_path / "x", backend, "llama", pre=None, eos_token="<|new|>")
    assert facts(case, tmp_path).eos == "<|new|>"
