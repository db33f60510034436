"""Special tokens, merges and chat templates of a tokenizer as GGUF metadata, by the PyPI package gguf."""

import contextlib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gguf

from streamquant.convert.metadata.vocabulary_files import TokenizerFiles, check_text, content_of, read_json, require
from streamquant.quant.errors import StreamquantError

_MAX_TEMPLATE = 4 * 1024 * 1024  # bytes; the longest published templates have 30 kB


class _Warnings(logging.Handler):
    """Collects what the library gguf warns of, but for what does not matter here."""

    # Values replaced on purpose; kinds that GGUF has no key for; templates for pairs of texts, which llama.cpp ignores.
    EXPECTED = ("Duplicated key name", "No handler for special token type", "<pair>")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not any(part in text for part in self.EXPECTED):
            self.texts.append(f"special tokens: {text}")


@contextlib.contextmanager
def _gguf_warnings() -> Iterator[list[str]]:
    logger, handler = logging.getLogger("gguf"), _Warnings()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _special(files: TokenizerFiles, *, merges: bool, types: Iterable[str] | None = None) -> Any:
    try:
        special = gguf.SpecialVocab(files.folder, load_merges=merges, special_token_types=types)
        if merges and not special.merges and files.tokenizer is not None:  # there is no tokenizer.json
            special.merges = [" ".join(pair) for pair in files.tokenizer["model"].get("merges") or []]
        return special
    except Exception as fault:  # the files were checked before: what is left is a template the library cannot follow
        raise StreamquantError(
            "the library gguf cannot read the special tokens",
            where=str(files.folder),
            found=f"{type(fault).__name__}: {fault}",
        ) from fault


def write_special(
    writer: Any, files: TokenizerFiles, *, merges: bool, named: Mapping[str, str] | None = None
) -> Iterable[str]:
    """Write special token ids, add_*_token flags, chat templates and (`merges`) the merge rules; return notes.

    `named` are the texts of tokens by kind that the family has where the files name none (VocabularyRules.special).
    Raises StreamquantError if a template is malformed, there are no merges, or no token has such a text.
    """
    template, notes = read_templates(files)
    with _gguf_warnings() as warned:
        special = _special(files, merges=merges)
        fixed = _follow_template(special, files)
        notes = (*notes, *_follow_map(special, files))
        for kind, number in _ids_of(named or {}, files).items():
            special.special_token_ids.setdefault(kind, number)
        special.chat_template = template
        if merges and not special.merges:
            raise StreamquantError("tokenizer.json has no merges", where=str(files.folder / "tokenizer.json"))
        special.add_to_gguf(writer, quiet=True)
    names = writer.kv_data[0].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES)
    if names is not None:
        names.value.sort()
    return [*(text for text in warned if not (fixed and "Unknown leading special token" in text)), *notes]


def _ids_of(named: Mapping[str, str], files: TokenizerFiles) -> dict[str, int]:
    added = (files.tokenizer or {}).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    if missing := [text for text in named.values() if text not in ids]:
        raise StreamquantError(
            "a special token of the family is missing",
            where=f"{files.folder / 'tokenizer.json'}, added_tokens",
            found=f"no {missing[0]!r}",
            required=", ".join(repr(text) for text in dict.fromkeys(named.values())),
            hint="is the tokenizer that of the model?",
        )
    return {kind: ids[text] for kind, text in named.items()}


def _follow_template(special: Any, files: TokenizerFiles) -> bool:
    """Take BOS from the post_processor where tokenizer_config.json names none; tell whether one leads.

    The converter does so since its gguf-py of 2026; gguf 0.19 on PyPI turns BOS off instead.
    """
    leading = _leading_token(files)
    if leading is None or not files.config:
        return False
    bos, cls = files.config.get("bos_token"), files.config.get("cls_token")
    if not bos and not cls:
        number = next((t["id"] for t in (files.tokenizer or {})["added_tokens"] if t["content"] == leading), None)
        if number is not None:
            special.special_token_ids["bos"] = number
    if not isinstance(files.config.get("add_bos_token"), bool) and (not bos or not cls):
        special.add_special_token["bos"] = True
    return True


def _follow_map(special: Any, files: TokenizerFiles) -> Iterator[str]:
    """Take the special tokens from special_tokens_map.json where transformers does and the converter does not."""
    ids = (
        {} if files.backend is None else {kind: files.backend.token_to_id(text) for kind, text in files.special.items()}
    )
    for kind, text in files.special.items():
        other, number = content_of(files.config.get(f"{kind}_token")), ids.get(kind)
        if other not in (None, text) and number is not None:
            special.special_token_ids[kind] = number
            yield (
                f"{kind}_token is {text!r} in special_tokens_map.json and {other!r} in tokenizer_config.json:"
                " transformers takes the first, and so does this file"
            )


def _leading_token(files: TokenizerFiles) -> str | None:
    """Return the text of the special token that TemplateProcessing puts first, or None."""
    processor = (files.tokenizer or {}).get("post_processor")
    if not processor:
        return None
    for part in processor.get("processors", [processor]):
        single = part.get("single", []) if part.get("type") == "TemplateProcessing" else []
        if len(single) > 1 and "SpecialToken" in single[0]:
            return str(single[0]["SpecialToken"]["id"])
    return None


def read_templates(files: TokenizerFiles) -> tuple[str | list[dict[str, str]] | None, tuple[str, ...]]:
    """Return the chat template (or several, as objects of `name` and `template`) of a folder, and notes.

    tokenizer_config.json wins over chat_template.jinja (with additional_chat_templates/*.jinja), which wins over
    chat_template.json; so does llama.cpp's converter, while transformers prefers the .jinja file.

    Raises StreamquantError if a template file is malformed.
    """
    beside, name = _templates_beside(files.folder)
    inside = files.config.get("chat_template")
    where = f"{files.folder / 'tokenizer_config.json'}, chat_template"
    for template, place in ((inside, where), (beside, f"{files.folder / name}")):
        _check_template(template, place)
    if inside is None:
        if beside is None:
            return None, ("no chat template found",)
        return beside, (f"chat template from {name}",)
    if beside is not None and beside != inside:
        return inside, (
            f"chat template from tokenizer_config.json; {name} differs from it, and transformers prefers that",
        )
    return inside, ("chat template from tokenizer_config.json",)


def _templates_beside(folder: pathlib.Path) -> tuple[Any, str]:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return read_json(folder / "chat_template.json").get("chat_template"), "chat_template.json"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not more:
        return read_template_file(path), path.name
    named = [{"name": "default", "template": read_template_file(path)}]
    return named + [{"name": item.stem, "template": read_template_file(item)} for item in more], path.name


def read_template_file(path: pathlib.Path) -> str:
    """The text of a template. Raises StreamquantError for a file that is too large or not UTF-8."""
    if path.stat().st_size > _MAX_TEMPLATE:
        raise StreamquantError(
            "chat template too large",
            where=str(path),
            found=f"{path.stat().st_size:,} bytes",
            required=f"at most {_MAX_TEMPLATE:,}",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise StreamquantError(
            "cannot read the chat template", where=str(path), found=fault, required="UTF-8"
        ) from fault


def _check_template(template: object, where: str) -> None:
    require(template, (str, list, type(None)), where)
    if isinstance(template, list):
        for number, entry in enumerate(template):
            require(entry, dict, f"{where}[{number}]")
            for key in ("name", "template"):
                require(entry.get(key), str, f"{where}[{number}].{key}")
                check_text(entry[key], f"{where}[{number}].{key}")
    elif isinstance(template, str):
        check_text(template, where)


def write_fill_in_the_middle(writer: Any, files: TokenizerFiles, ids: Mapping[str, int]) -> None:
    """Write the ids (by kind: prefix, suffix, middle, eot) of a model whose files do not name them (CodeLlama)."""
    with _gguf_warnings():
        special = _special(files, merges=False, types=tuple(ids))
        special.chat_template = None  # written already
        for kind, number in ids.items():
            special.special_token_ids.setdefault(kind, number)
        special.add_to_gguf(writer, quiet=True)
