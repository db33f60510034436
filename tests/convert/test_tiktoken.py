"""tiktoken.model as a vocabulary: token ids against ranks merged one by one, and broken files."""

import base64
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from streamquant.convert.architectures import VocabularyRules
from streamquant.convert.metadata.pretokenizer import KIMI
from streamquant.convert.metadata.tiktoken import merges_of, read_ranks, read_tiktoken
from streamquant.convert.metadata.vocabulary import read_vocabulary
from streamquant.model.corpus import read_tokenizer
from streamquant.quant.errors import StreamquantError
from tests.tokenizer_folders import KIMI_CODE, TEXT, TIKTOKEN, write_tiktoken

RULES = VocabularyRules(tiktoken=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiktoken(tmp_path)


def ids_by_rank(ranks: dict[bytes, int], text: str) -> list[int]:
    """Token ids as tiktoken has them: in each piece of the regex the pair of the lowest rank is merged, repeatedly."""
    found = []
    for piece, _ in pre_tokenizers.Split(Regex(KIMI), "isolated").pre_tokenize_str(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while len(parts) > 1:
            ranked = [(ranks.get(a + b, len(ranks)), at) for at, (a, b) in enumerate(pairwise(parts))]
            rank, at = min(ranked)
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found


def test_ids_are_those_of_the_ranks(folder: Path) -> None:
    ranks = read_ranks(folder / "tiktoken.model")
    text = f"{TEXT} the thing is     qqq 'tis \u6771\u4eac the's"
    assert read_tokenizer(folder).encode(text, add_special_tokens=False).ids == ids_by_rank(ranks, text)
    assert read_tokenizer(folder).encode("a<|im_end|>b").ids == [97, 256 + len(TIKTOKEN) + 2, 98]


def test_what_merges_do_not_reach_has_none(folder: Path) -> None:
    ranks = read_ranks(folder / "tiktoken.model")
    merged = [left + right for left, right in merges_of(ranks)]
    assert merged == [token for token in TIKTOKEN if token != b"qqq"]
    assert (b"th", b"e") in list(merges_of(ranks))


def test_the_regex_of_the_code_is_read_and_the_code_is_not_run(folder: Path) -> None:
    vocabulary = read_vocabulary(folder, RULES, vocab_size=320)
    assert vocabulary.metadata["tokenizer.ggml.pre"].value == "kimi-k2"
    assert any("asks for code of the checkpoint" in note for note in vocabulary.notes)


@pytest.mark.parametrize(
    "code",
    [None, "pat_str = 3", "def f(:", 'pat_str = "|".join([x])', KIMI_CODE.replace("pat_str", "other"), "\0"],
)
def test_without_a_regex_the_name_is_asked_for(folder: Path, code: str | None) -> None:
    """The published vocabulary is known by its hash; of others nobody knows how they split text."""
    path = folder / "tokenization_kimi.py"
    path.unlink() if code is None else path.write_text(code)
    with pytest.raises(StreamquantError, match=r"unknown pre-tokenizer[\s\S]*--pre"):
        read_vocabulary(folder, RULES, vocab_size=320)
    assert (
        read_vocabulary(folder, RULES, vocab_size=320, pre="kimi-k2").metadata["tokenizer.ggml.model"].value == "gpt2"
    )


def test_another_regex_is_another_tokenizer(folder: Path) -> None:
    (folder / "tokenization_kimi.py").write_text('class T:\n    pat_str = r"\\s+|\\S+"\n')
    with pytest.raises(StreamquantError, match="unknown pre-tokenizer"):
        read_vocabulary(folder, RULES, vocab_size=320)


@pytest.mark.parametrize("named", [3, [], {"AutoTokenizer": ["../x.Y", None]}, {"AutoTokenizer": "tokenization_kimi"}])
def test_code_elsewhere_is_not_read(folder: Path, named: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"auto_map": named}
    tokenizer = read_tiktoken(folder, config, 320)
    assert tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"] != "Split"


def test_other_families_have_no_such_vocabulary(folder: Path) -> None:
    with pytest.raises(StreamquantError, match="no tokenizer"):
        read_vocabulary(folder, VocabularyRules(), vocab_size=320)


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no token for byte 0"),
        (line(b"a", 1), "the rank 0"),
        (line(b"a", 0) + line(b"a", 1), "a token of its own"),
        (b"a# 0\n", "in base64"),
        (b"YQ== zero\n", "the rank 0"),
        (b"YQ==\n", "the rank 0"),
        (b" 0\n", "the rank 0"),
        (b"\xff\xfe 0\n", "in base64"),
        (b"".join(line(bytes([byte]), byte) for byte in range(255)), "no token for byte 255"),
    ],
)
def test_broken_files(folder: Path, content: bytes, message: str) -> None:
    (folder / "tiktoken.model").write_bytes(content)
    with pytest.raises(StreamquantError, match=rf"a vocabulary of tiktoken[\s\S]*{re.escape(message)}"):
        read_vocabulary(folder, RULES, vocab_size=320)


@pytest.mark.parametrize("size", [260, 288])
def test_more_tokens_than_embeddings(folder: Path, size: int) -> None:
    """Ranks, or special tokens with a name; those without one are cut."""
    with pytest.raises(StreamquantError, match="token ids are not below the vocabulary size"):
        read_vocabulary(folder, RULES, vocab_size=size)
    assert len(read_vocabulary(folder, RULES, vocab_size=289).metadata["tokenizer.ggml.tokens"].value) == 289
