"""Vocabularies for llama.cpp's SentencePiece tokenizer: from tokenizer.model, or from a byte-fallback tokenizer.json.

llama.cpp merges the neighbours whose joined text is the token with the highest score (src/llama-vocab.cpp,
llm_tokenizer_spm_session); Hugging Face merges the neighbours whose merge rule comes first. Both give the same ids if
tokens score the lower the later their first rule comes, which is how SentencePiece numbers its own scores.
"""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gguf import TokenType

from streamquant.convert.metadata.vocabulary_files import TokenizerFiles, read_json, require
from streamquant.quant.errors import StreamquantError

SPACE = "▁"  # how SentencePiece writes a space
UNSCORED, PADDING_SCORE = -1000.0, -10000.0  # llama.cpp's converter, base.py: added tokens, [PAD]
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tokens that act as control tokens but are often not marked so (llama.cpp's converter, does_token_look_special).
_CONTROL_TEXTS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_CONTROL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class Pieces(NamedTuple):
    """Token texts, scores (higher merges earlier) and gguf token types, one each per id; notes for the plan; ids of the
    special tokens (by kind: bos, eos, unk) that the file itself names.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    notes: tuple[str, ...]
    own: Mapping[str, int] = MappingProxyType({})


def looks_special(text: str) -> bool:
    """Tell whether a token is written like a control token, such as '<|im_end|>' or '<pad>'."""
    return text in _CONTROL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _CONTROL_ENDS)


def added_type(text: str, special: bool) -> int:
    """Return the gguf token type of an added token."""
    return int(TokenType.CONTROL if special or looks_special(text) else TokenType.USER_DEFINED)


def pieces_from_model(files: TokenizerFiles, vocab_size: int) -> tuple[Pieces | None, tuple[str, ...]]:
    """Return the pieces of tokenizer.model, with the added tokens of the other files laid over them, and notes.

    None if that file is missing, is not SentencePiece's (as in Llama 3), or has another vocabulary than tokenizer.json:
    transformers reads the latter alone, so that the model was trained with its ids.

    Raises StreamquantError if the package sentencepiece is missing, an id is not below `vocab_size`, or
    added_tokens.json is malformed.
    """
    path = files.folder / "tokenizer.model"
    if not path.is_file():
        return None, ()
    processor = _load(path, fallback=files.tokenizer is not None)
    if processor is None:
        return None, ()
    count = processor.vocab_size()
    texts = [processor.IdToPiece(number) for number in range(count)]
    if (other := _difference(files, texts)) is not None:
        return None, (f"WARNING: tokenizer.model is not used, as in transformers: {other}",)
    if count > vocab_size:
        raise StreamquantError(
            f"{count - vocab_size} token ids are not below the vocabulary size",
            where=str(path),
            found=f"{count} pieces",
            required=f"at most {vocab_size}, the rows of the embedding",
        )
    pieces = Pieces([], [], [], ())
    _pad(pieces, vocab_size)
    for number in range(count):
        pieces.tokens[number] = texts[number]
        pieces.scores[number] = processor.GetScore(number)
        pieces.types[number] = _type_of_piece(processor, number)
    _overlay(pieces, files)
    laid = (*_overlay_json(pieces, files), *_note_beyond(files, vocab_size))
    unused = sum(text == f"[PAD{i}]" for i, text in enumerate(pieces.tokens))
    notes = (f"vocabulary of {count} pieces from tokenizer.model (SentencePiece)", *laid, *_padding_note(unused))
    own = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    return pieces._replace(own={kind: number for kind, number in own.items() if number >= 0}), notes


def _difference(files: TokenizerFiles, pieces: list[str]) -> str | None:
    """What tokenizer.json has instead of the pieces of tokenizer.model; added tokens may replace and follow them."""
    if files.tokenizer is None or files.backend is None:
        return None
    if not files.tokenizer["model"].get("byte_fallback"):
        return "tokenizer.json is byte-level BPE"
    added = files.backend.get_added_tokens_decoder()
    texts = {number: text for text, number in files.tokenizer["model"]["vocab"].items() if number not in added}
    wrong = sorted(
        number
        for number in {*texts, *range(len(pieces))} - added.keys()
        if texts.get(number) != (pieces[number] if number < len(pieces) else None)
    )
    if not wrong:
        return None
    first = wrong[0]
    theirs = repr(pieces[first]) if first < len(pieces) else "nothing"
    return f"{len(wrong)} ids have other tokens in tokenizer.json; first {first}: {texts.get(first)!r}, not {theirs}"


def _load(path: Any, *, fallback: bool) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as fault:
        raise StreamquantError(
            "the package sentencepiece is needed to read tokenizer.model",
            where=str(path),
            hint="pip install sentencepiece",
        ) from fault
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
        for number in range(processor.vocab_size()):
            processor.IdToPiece(number)
    except (RuntimeError, OSError, UnicodeDecodeError) as fault:  # texts of the file, also in messages, may be no UTF-8
        if fallback:
            return None
        raise StreamquantError(
            "tokenizer.model is no SentencePiece model",
            where=str(path),
            found=str(fault)[:200],
            hint="add the tokenizer.json of the model",
        ) from fault
    return processor


def _type_of_piece(processor: Any, number: int) -> int:
    tests = (
        (processor.IsUnknown, TokenType.UNKNOWN),
        (processor.IsControl, TokenType.CONTROL),
        (processor.IsUnused, TokenType.UNUSED),
        (processor.IsByte, TokenType.BYTE),
    )
    return int(next((kind for test, kind in tests if test(number)), TokenType.NORMAL))


def _overlay(pieces: Pieces, files: TokenizerFiles) -> None:
    """Write the added tokens of added_tokens.json and tokenizer_config.json over the pieces, in that order."""
    path = files.folder / "added_tokens.json"
    decoder = files.config.get("added_tokens_decoder") or {}
    declared = {token["content"]: int(key) for key, token in decoder.items()}
    for text, number in read_json(path).items():
        require(number, int, f"{path}, {text!r}")
        if declared.get(text, number) == number:  # transformers reads the file only where there is no decoder
            _put(pieces, number, text, int(TokenType.USER_DEFINED), str(path))
    for key, token in decoder.items():
        text, kind = token["content"], added_type(token["content"], bool(token.get("special")))
        text = text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text
        _put(pieces, int(key), text, kind, str(files.folder / "tokenizer_config.json"))


def _overlay_json(pieces: Pieces, files: TokenizerFiles) -> tuple[str, ...]:
    """Write the added tokens of tokenizer.json over the pieces, where those say otherwise; return a note if any did.

    The converter does not read them: it has [PADn], or a word, in their place.
    """
    laid = []
    for number, token in sorted((files.backend.get_added_tokens_decoder() if files.backend else {}).items()):
        kind = added_type(token.content, token.special)
        text = token.content.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token.content
        known = pieces.types[number] in (kind, int(TokenType.CONTROL), int(TokenType.UNKNOWN))
        if not known or pieces.tokens[number] != text:
            _put(pieces, number, text, kind, str(files.folder / "tokenizer.json"))
            laid.append(text)
    if not laid:
        return ()
    shown = ", ".join(map(repr, laid[:5])) + (", ..." if len(laid) > 5 else "")
    return (f"{len(laid)} added tokens of tokenizer.json that tokenizer.model has not are laid over it: {shown}",)


def _put(pieces: Pieces, number: int, text: str, kind: int, where: str) -> None:
    if number < 0:
        raise StreamquantError(
            "added token id out of range", where=f"{where}, {text!r}", found=number, required="0 or more"
        )
    if number < len(pieces.tokens):
        pieces.tokens[number], pieces.scores[number], pieces.types[number] = text, UNSCORED, kind


def _note_beyond(files: TokenizerFiles, rows: int) -> tuple[str, ...]:
    """A note on added tokens that the embedding has no row for: the model cannot take them.

    They are left out, as by the converter (_create_vocab_sentencepiece of conversion/base.py).
    """
    decoder = files.config.get("added_tokens_decoder") or {}
    added = {int(key): token["content"] for key, token in decoder.items()}
    added |= {number: text for text, number in read_json(files.folder / "added_tokens.json").items()}
    beyond = sorted(number for number in added if number >= rows)
    if not beyond:
        return ()
    named = ", ".join(f"{number} {added[number]!r:.40}" for number in beyond[:5])
    return (f"WARNING: {len(beyond)} added tokens are left out: the embedding ends at row {rows - 1}: {named}",)


def pieces_from_merges(files: TokenizerFiles, vocab_size: int) -> Pieces:
    """Return the pieces of a byte-fallback tokenizer.json, with scores that make llama.cpp merge by its rules."""
    assert files.tokenizer is not None
    assert files.backend is not None
    model = files.tokenizer["model"]
    pieces = Pieces([], [], [], ())
    _pad(pieces, vocab_size)
    ranks, notes = merge_scores(model["vocab"], model["merges"])
    added = files.backend.get_added_tokens_decoder()
    vocab = files.backend.get_vocab(with_added_tokens=True)
    for text, number in vocab.items():
        pieces.tokens[number] = text
        if number in added:
            special = added[number].special or text in files.named
            pieces.scores[number], pieces.types[number] = UNSCORED, _added_type_plain(special)
        elif _BYTE.fullmatch(text):
            pieces.scores[number], pieces.types[number] = UNSCORED, int(TokenType.BYTE)
        else:
            pieces.scores[number] = ranks.get(text, UNSCORED)
            pieces.types[number] = int(TokenType.NORMAL)
    return pieces._replace(notes=(*notes, *_padding_note(vocab_size - len(set(vocab.values())))))


def _added_type_plain(special: bool) -> int:
    return int(TokenType.CONTROL if special else TokenType.USER_DEFINED)


def merge_scores(vocab: Mapping[str, int], merges: list[Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return score by token for every token of more than one character, and notes where scores cannot say it all.

    The n-th token (from 0) to be made by a merge rule scores -n; tokens that no rule makes come after all of those.
    Exact if the rules that make one token follow one another and no rule is missing, as in every tokenizer.json that
    was derived from a SentencePiece model; else a note tells how often it is not.
    """
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
    order: dict[str, int] = {}
    scattered, last = 0, ""
    for left, right in pairs:
        scattered += left + right in order and left + right != last
        last = left + right
        order.setdefault(last, len(order))
    ruled = set(pairs)
    missing = sum(
        (text[:cut], text[cut:]) not in ruled
        for text in vocab
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    )
    scores = {text: -float(order.get(text, len(order))) for text in vocab if len(text) > 1}
    notes = [
        f"tokenizer.ggml.scores: from the order of {len(pairs)} merge rules (the reference converter writes -1000)"
    ]
    if scattered or missing:
        notes.append(
            f"llama.cpp may split some words otherwise than Hugging Face: {missing} pairs of tokens join to a token "
            f"without a merge rule, {scattered} rules are out of order"
        )
    return scores, tuple(notes)


def space_prefix(files: TokenizerFiles) -> tuple[bool, tuple[str, ...]]:
    """Return whether a byte-fallback tokenizer.json puts a space before text, and notes.

    Raises StreamquantError if its normalizer and pre_tokenizer do anything else than write spaces as '▁', which is all
    that llama.cpp's SentencePiece tokenizer does.
    """
    assert files.tokenizer is not None
    prefix, notes, unknown = False, [], []
    for step in [*_steps(files.tokenizer, "normalizer"), *_steps(files.tokenizer, "pre_tokenizer")]:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Metaspace", "replacement": "▁", **rest} if not rest.get("split", True):
                scheme = rest.get("prepend_scheme", "always" if rest.get("add_prefix_space", True) else "never")
                prefix = prefix or scheme != "never"
                if scheme == "first":
                    notes.append(
                        "llama.cpp puts a space after special tokens too; Hugging Face only before the first text"
                    )
            case _:
                unknown.append(json.dumps(step, ensure_ascii=False)[:200])
    if unknown:
        raise StreamquantError(
            "unknown pre-tokenizer: llama.cpp's SentencePiece tokenizer only writes spaces as '▁'",
            where=f"{files.folder / 'tokenizer.json'}, normalizer and pre_tokenizer",
            found="; ".join(unknown),
            required="Prepend '▁', Replace ' ' by '▁', or Metaspace with split=false",
            hint="pass --pre default to go on all the same (after comparing token ids), or report the tokenizer",
        )
    return prefix, tuple(notes)


def _steps(tokenizer: Mapping[str, Any], key: str) -> list[Any]:
    step = tokenizer.get(key)
    if step is None:
        return []
    return list(step[key.replace("_", "") + "s"]) if step.get("type") == "Sequence" else [step]


def _pad(pieces: Pieces, vocab_size: int) -> None:
    pieces.tokens.extend(f"[PAD{i}]" for i in range(vocab_size))
    pieces.scores.extend([PADDING_SCORE] * vocab_size)
    pieces.types.extend([int(TokenType.UNUSED)] * vocab_size)


def _padding_note(count: int) -> tuple[str, ...]:
    return (f"{count} ids have no token: [PADn], unused",) if count else ()
