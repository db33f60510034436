"""The name of a pre-tokenizer: from a definition and a hash; the ids behind it are tested in test_vocabulary."""

import hashlib
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from streamquant.convert.metadata import pretokenizer
from streamquant.convert.metadata.pretokenizer import (
    CHECK_TEXT,
    GROUPS,
    HASHES,
    KNOWN_NAMES,
    Group,
    check_hashes,
    choose_pre,
    definition_of,
)
from streamquant.quant.errors import StreamquantError, UsageError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def tokenizer_json(*steps: dict[str, Any], ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "model": {"type": "BPE", "ignore_merges": ignore_merges},
    }


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def choose(backend: Tokenizer, definition: dict[str, Any], pre: str | None = None) -> tuple[str, tuple[str, ...]]:
    return choose_pre(definition, backend, bos_id=None, pre=pre, where="tokenizer.json")


def claim(monkeypatch: pytest.MonkeyPatch, backend: Tokenizer, name: str) -> None:
    """Let the hash of the backend's ids stand for `name`."""
    monkeypatch.setitem(HASHES, check_hashes(backend, None)[0], name)


def definition_for(group: Group) -> dict[str, Any]:
    steps = [split(step.removeprefix("split ")) for step in group.definitions[0][:-1]]
    return tokenizer_json(*steps, BYTE_LEVEL, ignore_merges=group.ignore_merges)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.canonical)
def test_definition_alone(backend: Tokenizer, group: Group) -> None:
    name, notes = choose(backend, definition_for(group))
    assert name == group.canonical
    assert notes[0].endswith("is new")


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.canonical)
def test_every_hash_of_the_group_wins_if_it_agrees(
    backend: Tokenizer, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in group.names:
        claim(monkeypatch, backend, name)
        assert choose(backend, definition_for(group))[0] == name


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.canonical)
def test_a_hash_of_another_group_stops(backend: Tokenizer, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(g for g in GROUPS if g is not group)
    claim(monkeypatch, backend, other.canonical)
    pattern = rf"different pre-tokenizers\n.*\n.*definition '{group.canonical}'.*hash '{other.canonical}'\n.*\n.*--pre"
    with pytest.raises(StreamquantError, match=pattern):
        choose(backend, definition_for(group))


def test_hash_alone(backend: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(monkeypatch, backend, "qwen2")
    name, notes = choose(backend, tokenizer_json(split("x+"), BYTE_LEVEL))
    assert name == "qwen2"
    assert "from llama.cpp's hash alone" in notes[0]
    # The same with another merging rule is no longer what the hash stands for.
    with pytest.raises(StreamquantError, match="definition 'unknown'"):
        choose(backend, tokenizer_json(split("x+"), BYTE_LEVEL, ignore_merges=True))


def test_neither(backend: Tokenizer) -> None:
    with pytest.raises(StreamquantError, match=r"split x\+ -> bytes, ignore_merges=false; hash [0-9a-f]{64}"):
        choose(backend, tokenizer_json(split("x+"), BYTE_LEVEL))


def test_choice_of_the_user(backend: Tokenizer) -> None:
    qwen2 = definition_for(next(g for g in GROUPS if g.canonical == "qwen2"))
    assert "agrees with" in choose(backend, qwen2, "deepseek-r1-qwen")[1][0]
    assert "DISAGREES with 'qwen2'" in choose(backend, qwen2, "llama-bpe")[1][0]
    assert choose(backend, tokenizer_json(split("x+"), BYTE_LEVEL), "viking")[0] == "viking"
    with pytest.raises(UsageError, match=r"--pre\n.*'qwen'\n.*llama-bpe"):
        choose(backend, qwen2, "qwen")


def test_ignore_merges_is_part_of_the_definition(backend: Tokenizer) -> None:
    llama, tekken = pretokenizer._LLAMA3, pretokenizer._TEKKEN
    assert choose(backend, tokenizer_json(split(llama), BYTE_LEVEL, ignore_merges=True))[0] == "llama-bpe"
    assert choose(backend, tokenizer_json(split(llama), BYTE_LEVEL))[0] == "smaug-bpe"
    with pytest.raises(StreamquantError, match="unknown pre-tokenizer"):
        choose(backend, tokenizer_json(split(tekken), BYTE_LEVEL))


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_ranks_of_tiktoken_have_either(backend: Tokenizer, ignore_merges: bool) -> None:
    """transformers' TikTokenConverter, which makes the tokenizers of GPT-OSS and Llama 4, sets ignore_merges."""
    definition = tokenizer_json(split(pretokenizer._GPT4O), BYTE_LEVEL, ignore_merges=ignore_merges)
    assert choose(backend, definition)[0] == "gpt-4o"


def test_equal_behaviour_has_one_spelling() -> None:
    digits, inner = {"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}
    by_name = definition_of(tokenizer_json(digits, inner))
    assert by_name == definition_of(tokenizer_json(split(r"\p{N}"), split(pretokenizer._GPT2), BYTE_LEVEL))
    implied = {key: value for key, value in inner.items() if key != "use_regex"}
    assert by_name == definition_of(tokenizer_json(digits, implied))
    alone = {"pre_tokenizer": implied}
    assert definition_of(alone) == definition_of(tokenizer_json(implied))
    assert definition_of(tokenizer_json(split("[\r\n]", "Removed", True))) == (r"split [\r\n]",)


@pytest.mark.parametrize(
    "step",
    [
        split("a", "MergedWithNext"),
        split("a", "Isolated", True),
        split("a", "Removed"),
        {"type": "Digits", "individual_digits": False},
        {**BYTE_LEVEL, "add_prefix_space": True},
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False},
        {"type": "Punctuation", "behavior": "Isolated"},
    ],
)
def test_other_behaviour_is_unknown(step: dict[str, Any]) -> None:
    assert definition_of(tokenizer_json(step))[0].startswith("{")


def test_normalizers() -> None:
    nfc, lower = {"type": "NFC"}, {"type": "Lowercase"}
    assert definition_of(tokenizer_json(BYTE_LEVEL, normalizer=nfc)) == ("bytes",)
    both = {"type": "Sequence", "normalizers": [nfc, lower]}
    assert definition_of(tokenizer_json(BYTE_LEVEL, normalizer=both)) == ('normalizer {"type": "Lowercase"}', "bytes")


def test_hash_is_tried_with_and_without_bos(backend: Tokenizer) -> None:
    ids = backend.encode(CHECK_TEXT).ids
    expected = [hashlib.sha256(str(case).encode()).hexdigest() for case in (ids, [7, *ids])]
    assert list(check_hashes(backend, 7)) == expected
    assert list(check_hashes(backend, None)) == expected[:1]


def test_tables_fit_together() -> None:
    names = [name for group in GROUPS for name in group.names]
    assert len(names) == len(set(names))
    assert all(group.canonical in group.names for group in GROUPS)
    assert set(HASHES.values()) <= set(names)
    assert all(len(digest) == 64 for digest in HASHES)
    assert {"youtu", "afmoe", "default"} <= KNOWN_NAMES
    assert len(KNOWN_NAMES) == len(pretokenizer.OTHER_NAMES) + len(names)
