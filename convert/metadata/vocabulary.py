"""The tokenizer and the chat templates of a checkpoint as GGUF metadata, equal to what llama.cpp's converter writes."""

import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import gguf

from streamquant.convert.architectures import VocabularyRules
from streamquant.convert.metadata.pretokenizer import BYTES, choose_pre, definition_of
from streamquant.convert.metadata.vocabulary_defaults import write_missing
from streamquant.convert.metadata.vocabulary_files import TokenizerFiles, content_of, read_files
from streamquant.convert.metadata.vocabulary_special import write_fill_in_the_middle, write_special
from streamquant.convert.metadata.vocabulary_spm import (
    Pieces,
    added_type,
    pieces_from_merges,
    pieces_from_model,
    space_prefix,
)
from streamquant.quant.errors import StreamquantError, UsageError

GGUFValue: TypeAlias = gguf.gguf_writer.GGUFValue

# GGUF keys whose values may differ from those of llama.cpp's converter, and why. Everything else is equal.
DEVIATIONS: dict[str, str] = {
    "tokenizer.ggml.model": "tokenizer.model and tokenizer.json have different vocabularies: the converter takes the"
    " first, transformers the second, and so do all keys of the vocabulary here.",
    "tokenizer.ggml.scores": "byte-fallback tokenizer.json: the converter writes -1000 for all; llama.cpp merges by"
    " score, so its ids would differ from Hugging Face's. Here the scores fall in the order of the merge rules.",
    "tokenizer.ggml.token_type": "byte-fallback tokenizer.json: the converter takes only tokens named in"
    " tokenizer_config.json as CONTROL; here those marked special in tokenizer.json are too, added tokens that replace"
    " a base token are USER_DEFINED, and missing ids are UNUSED.",
    "tokenizer.ggml.tokens": "byte-fallback tokenizer.json with fewer tokens than the embedding has rows: the converter"
    " writes too few and llama.cpp refuses the file; here [PADn] fills them up, as everywhere else. tokenizer.model"
    " beside a tokenizer.json with further added tokens: the converter writes [PADn] for them; here their texts and"
    " types, with a score of -1000.",
    "tokenizer.ggml.add_space_prefix": "byte-fallback tokenizer.json that puts no space before text, and no"
    " add_prefix_space in tokenizer_config.json: the converter writes nothing, so that llama.cpp adds one; here"
    " false.",
    "tokenizer.ggml.bos_token_id": "no BOS known to the converter, where llama.cpp's default is another token than the"
    " checkpoint's: id 11 of a byte-level vocabulary, 1 of SentencePiece. Where special_tokens_map.json and"
    " tokenizer_config.json name different tokens, transformers takes the first and the converter the second.",
    "tokenizer.ggml.eos_token_id": "the same. The converter reads neither a list of ids nor generation_config.json,"
    " which transformers prefers to config.json.",
    "tokenizer.ggml.unknown_token_id": "the same, SentencePiece only; llama.cpp's default is id 0.",
    "tokenizer.ggml.eot_token_id": "an answer ends at a token at which llama.cpp would not stop by itself.",
    "tokenizer.ggml.eom_token_id": "the same, for a second such token.",
    "tokenizer.ggml.add_bos_token": "missing, and llama.cpp would add BOS where the checkpoint's tokenizer adds none.",
    "tokenizer.ggml.add_eos_token": "true in tokenizer_config.json, and no file names an EOS: the converter writes"
    " true, and llama.cpp would add id 11; here false.",
    "tokenizer.chat_template": "chat_template null in tokenizer_config.json, or no such file: the converter ignores"
    " chat_template.jinja; here it is written.",
    "tokenizer.chat_templates": "the names are sorted; the converter's order is a Python set's, new in every run.",
}


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary as GGUF metadata.

    metadata  tokenizer.* keys -> value, type and sub-type, in the order of the converter
    notes     each decision that a user should see in the plan, one sentence each
    """

    metadata: dict[str, GGUFValue]
    notes: tuple[str, ...] = field(default=())


def read_vocabulary(
    folder: pathlib.Path, rules: VocabularyRules, *, vocab_size: int, pre: str | None = None
) -> Vocabulary:
    """Read the tokenizer of a checkpoint folder and return it as GGUF metadata.

    folder      holds tokenizer.json (tokenizer.model, tiktoken.model), tokenizer_config.json, config.json, templates
    rules       what the converter does about the tokenizers of the model's family
    vocab_size  rows of the embedding: the number of tokens written
    pre         the name for tokenizer.ggml.pre, instead of the detected one

    Keys, types and values equal those of llama.cpp's converter (conversion/base.py: get_vocab_base, _set_vocab_gpt2,
    _set_vocab_sentencepiece, _set_vocab_llama_hf; conversion/llama.py: set_vocab) but for DEVIATIONS. Code that the
    checkpoint brings along is never run.

    Raises StreamquantError if a file is missing, malformed or of an unknown kind, UsageError on a wrong `pre`.
    """
    files = read_files(folder, vocab_size=vocab_size, tiktoken=rules.tiktoken)
    _refuse_unreadable(files)
    notes = list(files.notes)
    if files.config.get("auto_map"):
        notes.append(
            "tokenizer_config.json asks for code of the checkpoint (auto_map): not run, the files are read instead"
        )
    writer = gguf.GGUFWriter(path=None, arch="")
    if rules.add_space_prefix and files.config.get("add_prefix_space") is not None:
        writer.add_add_space_prefix(files.config["add_prefix_space"])
    pieces, told = pieces_from_model(files, vocab_size) if rules.sentencepiece else (None, ())
    notes += told
    if pieces is not None or _is_byte_fallback(files):
        notes += _write_spm(writer, files, pieces, vocab_size, pre)
        if rules.space_prefix is not None:
            writer.kv_data[0].pop(gguf.Keys.Tokenizer.ADD_PREFIX, None)
            writer.add_add_space_prefix(rules.space_prefix)
    else:
        notes += _write_bpe(writer, files, vocab_size, pre, rules)
    if vocab_size in rules.fill_in_the_middle:
        write_fill_in_the_middle(writer, files, rules.fill_in_the_middle[vocab_size])
    if vocab_size in rules.no_bos:
        writer.kv_data[0].pop(gguf.Keys.Tokenizer.ADD_BOS, None)
        writer.add_add_bos_token(False)
    _check_texts(writer, files)
    notes += write_missing(writer, files, {} if pieces is None else pieces.own)
    metadata = {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    return Vocabulary(metadata, tuple(dict.fromkeys(notes)))


def _refuse_unreadable(files: TokenizerFiles) -> None:
    if files.config.get("tokenizer_class") == "HybridDNATokenizer":
        raise StreamquantError("unknown tokenizer class", where=str(files.folder), found="HybridDNATokenizer")
    others = [name for name in ("tekken.json", "vocab.json", "merges.txt") if (files.folder / name).is_file()]
    # Of tekken.json and tokenizer.model the converter takes the first, which needs the package mistral-common.
    if files.tokenizer is not None or ("tekken.json" not in others and (files.folder / "tokenizer.model").is_file()):
        return
    raise StreamquantError(
        "no tokenizer",
        where=str(files.folder),
        found=", ".join(others) or "neither tokenizer.json nor tokenizer.model",
        required="tokenizer.json or tokenizer.model",
        hint="write tokenizer.json with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        if others
        else "copy the tokenizer files of the model into the folder",
    )


def _is_byte_fallback(files: TokenizerFiles) -> bool:
    """Tell SentencePiece-like BPE (characters, unknown ones as bytes) from byte-level BPE (GPT-2's)."""
    if files.tokenizer is None:
        raise StreamquantError(
            "no tokenizer.json, and tokenizer.model is of no use for this architecture",
            where=str(files.folder),
            required="tokenizer.json",
        )
    if BYTES in definition_of(files.tokenizer):
        return False
    if files.tokenizer["model"].get("byte_fallback"):
        return True
    raise StreamquantError(
        "unknown kind of tokenizer",
        where=str(files.folder / "tokenizer.json"),
        found="BPE that is neither byte-level (a ByteLevel pre_tokenizer) nor byte-fallback (model.byte_fallback)",
        required="one of the two",
    )


def _write_spm(
    writer: Any, files: TokenizerFiles, pieces: Pieces | None, vocab_size: int, pre: str | None
) -> Iterable[str]:
    if pre not in (None, "default"):
        raise UsageError(
            "--pre is for byte-level BPE; this tokenizer is SentencePiece", found=repr(pre), required="no --pre"
        )
    notes: list[str] = []
    if pieces is None:
        pieces = pieces_from_merges(files, vocab_size)
        notes += _write_space_prefix(writer, files, forced=pre is not None)
    _write_tokens(writer, "llama", "default", pieces.tokens, pieces.types, pieces.scores)
    return [*pieces.notes, *notes, *write_special(writer, files, merges=False)]


def _write_space_prefix(writer: Any, files: TokenizerFiles, *, forced: bool) -> Iterable[str]:
    try:
        prefix, notes = space_prefix(files)
    except StreamquantError:
        if not forced:
            raise
        return ("tokenizer.json's normalizer or pre_tokenizer is unknown; nothing was checked (--pre default)",)
    asked = files.config.get("add_prefix_space")
    if asked is None and not prefix:
        writer.add_add_space_prefix(False)
        return (*notes, "tokenizer.ggml.add_space_prefix = false: tokenizer.json puts no space before text")
    if asked is not None and asked != prefix:
        return (
            *notes,
            f"add_prefix_space = {asked} in tokenizer_config.json, but tokenizer.json does otherwise: the first wins",
        )
    return notes


def _write_bpe(
    writer: Any, files: TokenizerFiles, vocab_size: int, pre: str | None, rules: VocabularyRules
) -> Iterable[str]:
    assert files.tokenizer is not None
    assert files.backend is not None
    bos = content_of(files.config.get("bos_token"))
    name, notes = choose_pre(
        files.tokenizer,
        files.backend,
        bos_id=None if bos is None else files.backend.token_to_id(bos),
        pre=pre,
        where=str(files.folder / "tokenizer.json"),
    )
    tokens, types = _bpe_tokens(files, vocab_size)
    _write_tokens(writer, "gpt2", name, tokens, types)
    padding = types.count(int(gguf.TokenType.UNUSED))
    padded = (f"{padding} ids have no token: [PADn], unused",) if padding else ()
    return [*notes, *padded, *write_special(writer, files, merges=True, named=rules.special)]


def _bpe_tokens(files: TokenizerFiles, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return text and gguf token type by id; added tokens as plain text, all others in the byte-level alphabet."""
    backend = files.backend
    assert backend is not None
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(gguf.TokenType.UNUSED)] * vocab_size
    added = backend.get_added_tokens_decoder()
    for text, number in backend.get_vocab(with_added_tokens=True).items():
        token = added.get(number)
        tokens[number], types[number] = text, int(gguf.TokenType.NORMAL)
        if token is not None:
            # llama.cpp compares added tokens with raw text, so a token that is matched in raw text is written as such.
            raw = text if token.normalized else _raw_text(backend, text)
            types[number] = added_type(raw, token.special)
            spaced = types[number] == gguf.TokenType.USER_DEFINED
            tokens[number] = raw.replace("▁", " ") if spaced else raw
    return tokens, types


def _raw_text(backend: Any, text: str) -> str:
    ids = backend.encode(text, add_special_tokens=False).ids
    return str(backend.decode(ids, skip_special_tokens=False))


def _write_tokens(
    writer: Any, model: str, pre: str, tokens: list[str], types: list[int], scores: list[float] | None = None
) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types(types)


def _check_texts(writer: Any, files: TokenizerFiles) -> None:
    """Refuse what llama.cpp refuses to load: a text that two ids share (llama-vocab.cpp, load)."""
    owner: dict[str, int] = {}
    for number, text in enumerate(writer.kv_data[0][gguf.Keys.Tokenizer.LIST].value):
        if text in owner:
            raise StreamquantError(
                "two tokens have one text; llama.cpp would refuse the file",
                where=str(files.folder),
                found=f"{text!r}: ids {owner[text]} and {number}",
            )
        owner[text] = number
