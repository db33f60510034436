"""The tokenizer files of a checkpoint folder, read and checked once, so that what follows can rely on their types."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from streamquant.convert.metadata.tiktoken import FILE as TIKTOKEN
from streamquant.convert.metadata.tiktoken import loadable, read_tiktoken
from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import StreamquantError

SPECIAL_TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAG_NAMES = frozenset(f"add_{kind}_token" for kind in SPECIAL_TYPES)


@dataclass(frozen=True)
class TokenizerFiles:
    """What the folder says about its tokenizer.

    folder      where it was read from
    tokenizer   tokenizer.json, parsed, or what a tiktoken.model stands for; None if there is neither
    backend     the same, loaded by the library tokenizers, with the tokens that transformers would add; None likewise
    config      tokenizer_config.json; {} if there is none
    model       config.json; {} if there is none
    generation  generation_config.json; {} if there is none
    special     text by kind (bos, eos ...) of the special tokens that the tokenizer has in transformers
    named       tokens that tokenizer_config.json names as special (bos_token, additional_special_tokens ...)
    notes       what a user should know about the reading
    """

    folder: pathlib.Path
    tokenizer: dict[str, Any] | None
    backend: Tokenizer | None
    config: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]
    special: dict[str, str]
    named: tuple[str, ...]
    notes: tuple[str, ...]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is no such file; raises StreamquantError if it is anything else."""
    return read_json_object(path) if path.is_file() else {}


def require(value: object, kinds: type | tuple[type, ...], where: str) -> None:
    """Raise StreamquantError unless `value` is of one of `kinds`; a bool is no int."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise StreamquantError("wrong type", where=where, found=f"{type(value).__name__} {value!r:.80}", required=names)


def read_files(folder: pathlib.Path, *, vocab_size: int, tiktoken: bool = False) -> TokenizerFiles:
    """Read and check the files of a folder that say something of its tokenizer: tokenizer.json, tokenizer_config.json,
    special_tokens_map.json, config.json and generation_config.json.

    vocab_size  rows of the embedding; every id must be below it
    tiktoken    whether a tiktoken.model is read where there is no tokenizer.json

    Raises StreamquantError on broken JSON, wrong types, ids out of range, or files that contradict each other.
    """
    config, model = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    _check_config(config, folder / "tokenizer_config.json")
    _check_special_ids(model, vocab_size, folder / "config.json")
    checked_ids(generation.get("eos_token_id"), f"{folder / 'generation_config.json'}, eos_token_id")
    older = {} if config.get("added_tokens_decoder") else read_json(folder / "special_tokens_map.json")
    _check_config(older, folder / "special_tokens_map.json")
    named = tuple(dict.fromkeys([*_named(config), *_named(older)]))
    special = _special_texts(config) | _special_texts(older)
    tokenizer, path = read_json(folder / "tokenizer.json") or None, folder / "tokenizer.json"
    if tokenizer is None and tiktoken and (folder / TIKTOKEN).is_file():
        tokenizer, path = read_tiktoken(folder, config, vocab_size), folder / TIKTOKEN
    if tokenizer is None:
        return TokenizerFiles(folder, None, None, config, model, generation, special, named, ())
    backend = _load(path, tokenizer)
    notes = _add_tokens(backend, config, named, folder)
    _check_ids(backend, vocab_size, folder)
    return TokenizerFiles(folder, tokenizer, backend, config, model, generation, special, named, notes)


def _check_config(config: Mapping[str, Any], path: pathlib.Path) -> None:
    for key, value in config.items():
        where = f"{path}, {key}"
        if key in _FLAG_NAMES or key == "add_prefix_space":
            require(value, (bool, type(None)), where)
        elif key.endswith("_token"):
            # Other keys of this ending (such as add_something_token) carry flags.
            require(value, (str, dict, type(None), bool), where)
            if isinstance(value, dict):
                require(value.get("content"), str, f"{where}.content")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        require(config.get(key), (list, dict, type(None)), f"{path}, {key}")
    decoder = config.get("added_tokens_decoder", {})
    require(decoder, dict, f"{path}, added_tokens_decoder")
    for text in _named(config):
        check_text(text, f"{path}, special tokens")
    for number, token in decoder.items():
        where = f"{path}, added_tokens_decoder[{number!r}]"
        require(token, dict, where)
        require(token.get("content"), str, f"{where}.content")
        check_text(token["content"], where)
        if not number.isascii() or not number.isdigit():
            raise StreamquantError("wrong key", where=where, found=repr(number), required="a token id, 0 or more")


def _check_special_ids(model: Mapping[str, Any], vocab_size: int, path: pathlib.Path) -> None:
    text = model.get("text_config", {})
    require(text, dict, f"{path}, text_config")
    for part in (model, text):
        for kind in (*SPECIAL_TYPES, "eot", "eom", "prefix", "suffix", "middle"):
            key = f"{kind}_token_id"
            for number in checked_ids(part.get(key), f"{path}, {key}"):
                if not 0 <= number < vocab_size:
                    raise StreamquantError(
                        "special token id out of range",
                        where=f"{path}, {key}",
                        found=number,
                        required=f"0 to {vocab_size - 1}, the rows of the embedding",
                        hint="set it to null if the model has no such token",
                    )


def checked_ids(value: object, where: str) -> list[int]:
    """Return token ids as config.json spells them: one, a list, or null. Raises StreamquantError for anything else."""
    require(value, (int, list, type(None)), where)
    numbers: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for number in numbers:
        require(number, int, where)
    return numbers


def content_of(token: object) -> str | None:
    """Return the text of a token as tokenizer_config.json spells it: a string, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    values = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        values += extra.values() if isinstance(extra, dict) else extra
    yield from (text for text in map(content_of, values) if text is not None)


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    # transformers reads the older special_tokens_map.json only where added_tokens_decoder is missing; it wins then.
    found = {kind: content_of(config.get(f"{kind}_token")) for kind in SPECIAL_TYPES}
    return {kind: text for kind, text in found.items() if text is not None}


def _load(path: pathlib.Path, tokenizer: Mapping[str, Any]) -> Tokenizer:
    _check_vocab(path, tokenizer)
    try:
        is_file = path.name == "tokenizer.json"
        backend = Tokenizer.from_file(str(path)) if is_file else Tokenizer.from_str(json.dumps(loadable(tokenizer)))
    except BaseException as fault:  # a Rust panic is no Exception
        if isinstance(fault, KeyboardInterrupt | SystemExit):
            raise
        raise StreamquantError(
            "the library tokenizers cannot load tokenizer.json",
            where=str(path),
            found=str(fault)[:300],
            hint="the file is damaged or needs a newer version of tokenizers",
        ) from fault
    backend.no_truncation()
    backend.no_padding()
    for token in tokenizer.get("added_tokens") or []:
        if backend.token_to_id(token["content"]) != token["id"]:
            raise StreamquantError(
                "an added token does not get the id that tokenizer.json declares",
                where=f"{path}, added_tokens, {token['content']!r}",
                found=f"declared {token['id']}, loaded as {backend.token_to_id(token['content'])}",
                hint="ids of added tokens must follow the vocabulary without gaps",
            )
    return backend


def _check_vocab(path: pathlib.Path, tokenizer: Mapping[str, Any]) -> None:
    for key in ("normalizer", "pre_tokenizer", "post_processor"):
        require(tokenizer.get(key), (dict, type(None)), f"{path}, {key}")
    model = tokenizer.get("model")
    require(model, dict, f"{path}, model")
    assert model is not None
    # Files of tokenizers before 0.13 may lack `type`; the library tells BPE by its merges, and so does this.
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise StreamquantError(
            "unknown tokenizer model",
            where=f"{path}, model.type",
            found=repr(kind),
            required="'BPE' (byte-level or byte-fallback)",
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise StreamquantError(
                f"llama.cpp has no BPE with {key}",
                where=f"{path}, model.{key}",
                found=repr(model[key]),
                required="null",
            )
    vocab = model.get("vocab")
    require(vocab, dict, f"{path}, model.vocab")
    assert vocab is not None
    if not _is_plain(vocab):
        _check_entries(path, vocab)


def _is_plain(vocab: Mapping[Any, Any]) -> bool:
    """Whether a vocabulary is what it should be, found out quickly: it has 100,000 entries and more."""
    ids = list(vocab.values())
    if not all(type(number) is int for number in ids) or len(set(ids)) != len(ids):
        return False
    try:
        "".join(vocab).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_entries(path: pathlib.Path, vocab: Mapping[Any, Any]) -> None:
    """Raise StreamquantError for the first entry that is wrong."""
    owner: dict[int, str] = {}
    for text, number in vocab.items():
        require(number, int, f"{path}, model.vocab[{text!r}]")
        check_text(text, f"{path}, model.vocab, id {number}")
        if number in owner:
            raise StreamquantError(
                "two tokens have one id",
                where=f"{path}, model.vocab",
                found=f"{owner[number]!r} and {text!r}: {number}",
            )
        owner[number] = text


def check_text(text: str, where: str) -> None:
    """Raise StreamquantError unless `text` can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:  # JSON may spell half a surrogate pair
        raise StreamquantError("text is not valid Unicode", where=where, found=ascii(text)) from fault


def _add_tokens(
    backend: Tokenizer, config: Mapping[str, Any], named: tuple[str, ...], folder: pathlib.Path
) -> tuple[str, ...]:
    """Add what transformers adds on loading (PreTrainedTokenizerBase._from_pretrained): the tokens of
    tokenizer_config.json, and those of the older added_tokens.json where that has no added_tokens_decoder.
    """
    before = backend.get_vocab(with_added_tokens=True)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    place, declared = _declared(config, named, folder)
    extra = [token for _, token in sorted(declared, key=lambda item: item[0]) if token.content not in added]
    known = {token.content for _, token in declared}
    extra += [AddedToken(text, special=True) for text in named if text not in added and text not in known]
    if extra:
        backend.add_tokens(extra)
    for number, token in declared:
        if backend.token_to_id(token.content) != number:
            raise StreamquantError(
                "two tokenizer files disagree",
                where=f"{folder / place}, {token.content!r}",
                found=f"id {number}",
                required=f"id {backend.token_to_id(token.content)}, as in tokenizer.json",
                hint="the files are of two versions of the tokenizer: copy both from the same model",
            )
    fresh = [token.content for token in extra if token.content not in before]
    return tuple(
        f"token {text!r} is only in {place if text in known else 'tokenizer_config.json'}: id"
        f" {backend.token_to_id(text)}"
        for text in fresh
    )


def _declared(
    config: Mapping[str, Any], named: tuple[str, ...], folder: pathlib.Path
) -> tuple[str, list[tuple[int, AddedToken]]]:
    """The file that declares the ids of added tokens, and these."""
    decoder = config.get("added_tokens_decoder")
    if decoder:
        return "tokenizer_config.json", [
            (int(key), AddedToken(token["content"], **{flag: bool(token[flag]) for flag in _FLAGS if flag in token}))
            for key, token in decoder.items()
        ]
    tokens = read_json(folder / "added_tokens.json")
    for text, number in tokens.items():
        require(number, int, f"{folder / 'added_tokens.json'}, {text!r}")
        check_text(text, f"{folder / 'added_tokens.json'}, {number}")
    return "added_tokens.json", [
        (number, AddedToken(text, special=text in named, normalized=text not in named))
        for text, number in tokens.items()
    ]


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _check_ids(backend: Tokenizer, vocab_size: int, folder: pathlib.Path) -> None:
    beyond = sorted((n, text) for text, n in backend.get_vocab(with_added_tokens=True).items() if n >= vocab_size)
    if beyond:
        raise StreamquantError(
            f"{len(beyond)} token ids are not below the vocabulary size",
            where=str(folder / "tokenizer.json"),
            found=", ".join(f"{n} {text!r}" for n, text in beyond[:5]),
            required=f"0 to {vocab_size - 1}, the rows of the embedding",
            hint="the tokenizer is another model's, or the embedding was not resized; see also tokenizer_config.json",
        )
