"""A vocabulary of tiktoken (Kimi's tiktoken.model), as the tokenizer.json that it would be.

The file has a line for each token, its bytes in base64 and its rank, which is its id. It names neither the special
tokens, which tokenizer_config.json does, nor the regex, which stands in the code that the checkpoint brings along: that
is read, and never run. Merges are made of ranks as llama.cpp's converter makes them (DeepseekV2Model.set_vocab in
conversion/deepseek.py, QwenModel.bpe in conversion/qwen.py).
"""

import ast
import base64
import binascii
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from streamquant.convert.metadata.pretokenizer import KIMI
from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import StreamquantError

FILE = "tiktoken.model"
RESERVED = 258
"""Special tokens of Kimi, behind the ranks; those without a name are called after their ids (tokenization_kimi.py)."""
CONFIG = "tokenizer_config.json"
MAX_VOCABULARY = 1 << 31
MAX_FILE = 64 * 1024 * 1024
"""Bytes of the file; Kimi's has 2.8 MB."""
_CODE = re.compile(r"tokenization_\w{1,100}\.\w{1,100}", re.ASCII)
_MAX_CODE = 1024 * 1024


def read_tiktoken(folder: pathlib.Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The tokenizer.json that a folder's tiktoken.model stands for.

    config is its tokenizer_config.json; of the special tokens only those below vocab_size are there. Its pre_tokenizer
    is of an unknown type where the folder has no code that says the regex. Raises StreamquantError for a broken file.
    """
    path = folder / FILE
    ranks = read_ranks(path)
    spelled = {token: _spell(token) for token in ranks}
    merges = [[_spell(left), _spell(right)] for left, right in merges_of(ranks)]
    names = config.get("added_tokens_decoder") or {}
    highest = max([len(ranks) - 1, *map(int, names)])
    if highest >= vocab_size:
        raise StreamquantError(
            f"{highest + 1 - vocab_size} token ids are not below the vocabulary size",
            where=str(path),
            found=f"ids up to {highest}, those of {CONFIG} too",
            required=f"0 to {vocab_size - 1}, the rows of the embedding",
            hint="the tokenizer is another model's, or the embedding was not resized",
        )
    special = range(len(ranks), min(len(ranks) + RESERVED, vocab_size))
    added = [
        _added(number, names.get(str(number), {}).get("content", f"<|reserved_token_{number}|>")) for number in special
    ]
    regex = _regex_of_code(folder, config)
    split: dict[str, Any] = {"type": "the regex of the checkpoint's code"}
    if regex is not None:
        split = split_by(regex)
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_of]},
        "post_processor": None,
        "decoder": {**bytes_of, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def loadable(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The same with Kimi's regex where none is known, as the library tokenizers can load it."""
    split, bytes_of = tokenizer["pre_tokenizer"]["pretokenizers"]
    known = split if split["type"] == "Split" else split_by(KIMI)
    return {**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [known, bytes_of]}}


def tiktoken_backend(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder with a tiktoken.model. Raises StreamquantError for a broken file."""
    config = read_json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return Tokenizer.from_str(json.dumps(loadable(read_tiktoken(folder, config, MAX_VOCABULARY))))


def split_by(regex: str) -> dict[str, Any]:
    """The step of a tokenizer.json that splits text into the matches of a regex."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def read_ranks(path: pathlib.Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the file. Raises StreamquantError unless the ranks are 0, 1, 2, ... ."""
    if path.stat().st_size > MAX_FILE:
        raise _broken(path, f"{path.stat().st_size:,} bytes", f"at most {MAX_FILE:,}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        match line.split():
            case []:
                continue
            case [encoded, rank] if rank.isdigit() and int(rank) == len(ranks):
                token = _decoded(encoded)
                if not token or token in ranks:
                    raise _broken(path, f"line {number}: {line[:60]!r}", "a token of its own, in base64")
                ranks[token] = len(ranks)
            case _:
                raise _broken(path, f"line {number}: {line[:60]!r}", f"a token in base64, and the rank {len(ranks)}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _broken(path, f"no token for byte {missing[0]}", "a token for each of the 256 bytes")
    return ranks


def merges_of(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that make each longer one, in their order: what is left before its own rank is merged.

    A token that the others do not reach in that way has no merge.
    """
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _merged(ranks, token, rank)
            if len(parts) == 2:
                yield parts[0], parts[1]


def _merged(ranks: Mapping[bytes, int], token: bytes, below: int) -> list[bytes]:
    """The parts of a token after all merges of ranks lower than `below`, the lowest and the first of them first."""
    none = len(ranks)
    parts = [token[at : at + 1] for at in range(len(token))]
    pairs = [ranks.get(token[at : at + 2], none) for at in range(len(token) - 1)]
    while pairs and (least := min(pairs)) < below:
        at = pairs.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        if at > 0:
            pairs[at - 1] = ranks.get(parts[at - 1] + parts[at], none)
        if at < len(pairs):
            pairs[at] = ranks.get(parts[at] + parts[at + 1], none)
    return parts


def _printable() -> dict[int, str]:
    """Each byte as the printable character that byte-level BPE has for it (bytes_to_unicode of GPT-2)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in set(kept))
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


_PRINTABLE = _printable()


def _spell(token: bytes) -> str:
    return token.decode("latin-1").translate(_PRINTABLE)


def _decoded(encoded: bytes) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return b""


def _added(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}


def _broken(path: pathlib.Path, found: str, required: str) -> StreamquantError:
    return StreamquantError(
        "a vocabulary of tiktoken that cannot be read",
        where=str(path),
        found=found,
        required=required,
        hint="download the file again",
    )


def _regex_of_code(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """`pat_str` of the class that tokenizer_config.json names as its code, read from the syntax; None without."""
    named = config.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, Mapping) else None
    named = named[0] if isinstance(named, list) and named else named
    if not isinstance(named, str) or not _CODE.fullmatch(named):
        return None
    path = folder / f"{named.partition('.')[0]}.py"
    if not path.is_file() or path.stat().st_size > _MAX_CODE:
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = (_text(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_pattern(node.targets))
    return next((text for text in found if text is not None), None)


def _is_pattern(targets: list[ast.expr]) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pat_str" for target in targets)


def _text(value: ast.expr) -> str | None:
    """A text, or texts that a text joins, as they are spelled."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"),
            args=[ast.List(elts=parts) | ast.Tuple(elts=parts)],
            keywords=[],
        ):
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            return between.join(texts) if len(texts) == len(parts) else None
    return None
