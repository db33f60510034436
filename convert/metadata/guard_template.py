"""The two published guards against faults of Hermes' chat templates, for `--guard-template`.

1. bos_token may be undefined (LM Studio, a tokenizer without BOS): the template then fails on its first line.
2. thinking=True cuts earlier replies at </think>; a reply without one fails in transformers and LM Studio, and is
   silently lost in llama.cpp.
Both leave every rendering that worked as it was. (snagnever/macstudio-local-llm, docs/models/hermes-4-70b)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from streamquant.files.strict_json import parse_json
from streamquant.quant.errors import StreamquantError

_SPLIT = (
    r"(?P<text>[A-Za-z_][\w.]*(?:\[['\"]\w+['\"]\])*)"
    r"\.split\(\s*(?P<quote>['\"])</think>(?P=quote)\s*(?:,\s*1\s*)?\)\[1\]"
)
_SET = re.compile(
    r"\{%(?P<open>-?)\s*set\s+\w+\s*=(?:(?!%\}).)*?" + _SPLIT + r"(?:(?!%\}).)*?(?P<close>-?)%\}", re.DOTALL
)
_GUARD = re.compile(r"\{%-?\s*if\s+['\"]</think>['\"]\s+in\s+[^%]*%\}\s*$")
_BOS_USED = re.compile(r"\bbos_token\b")
_BOS_GUARDED = re.compile(r"\bbos_token\s+is\s+(not\s+)?defined\b")


@dataclass(frozen=True, slots=True)
class GuardedTemplate:
    """A template with guards, and one sentence for each that was put in (none: `text` is the template as it was)."""

    text: str
    changes: tuple[str, ...]


def guard_template(template: str, bos_token: str | None) -> GuardedTemplate:
    """Put in the guards that are missing. What is guarded already, or has neither fault, stays as it is.

    bos_token  the text of the tokenizer's BOS; None: no guard for it, as nothing is known to put in its place

    >>> guard_template("{{ bos_token + 'x' }}", "<s>").text
    "{%- if not bos_token is defined %}{% set bos_token = '<s>' %}{% endif %}\\n{{ bos_token + 'x' }}"
    >>> print(guard_template("{%- set a = '<think> </think>' + b.split('</think>', 1)[1] -%}", None).text)
    {%- if '</think>' in b %}{%- set a = '<think> </think>' + b.split('</think>', 1)[1] -%}{%- endif -%}
    """
    changes = []
    text, count = _guard_splits(template)
    if count:
        changes.append(f"an earlier reply is cut at </think> only if it has one ({count} places)")
    if bos_token and _BOS_USED.search(text) and not _BOS_GUARDED.search(text):
        # No newline is added in front of the text: the tag ends its line, and Jinja takes that newline away.
        text = f"{{%- if not bos_token is defined %}}{{% set bos_token = {_literal(bos_token)} %}}{{% endif %}}\n{text}"
        changes.append(f"bos_token is {bos_token} where the engine does not define it")
    return GuardedTemplate(text, tuple(changes))


def guard_gguf_keys(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tokenizer.* keys of a GGUF with every chat template guarded, and what changed."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    tokens = metadata.get("tokenizer.ggml.tokens")
    bos_token = str(tokens.value[bos.value]) if bos is not None and tokens is not None else None
    guarded, changes = dict(metadata), []
    for key, value in metadata.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            found = guard_template(value.value, bos_token)
            guarded[key] = GGUFValue(found.text, GGUFValueType.STRING)
            changes += [f"{key}: {change}" for change in found.changes]
    return guarded, tuple(changes)


def guard_side_file(name: str, content: bytes, bos_token: str | None) -> bytes:
    """A file of a checkpoint that may hold chat templates, with these guarded; any other comes back as it is.

    `name` is relative to the folder, `bos_token` as in tokenizer_config.json. Raises StreamquantError for a file that
    is not what its name says.
    """
    if name.endswith(".jinja"):
        try:
            return guard_template(content.decode(), bos_token).text.encode()
        except UnicodeDecodeError as error:
            raise StreamquantError("not a text file", where=name, found=str(error)) from error
    if name not in ("tokenizer_config.json", "chat_template.json"):
        return content
    settings = parse_json(content, name)
    templates = settings.get("chat_template") if isinstance(settings, dict) else None
    guarded = _guard_all(templates, bos_token)
    if guarded == templates:
        return content
    return (json.dumps({**settings, "chat_template": guarded}, indent=2, ensure_ascii=False) + "\n").encode()


def _guard_all(templates: Any, bos_token: str | None) -> Any:
    """A template, or a list of objects with one each; anything else comes back as it is."""
    if isinstance(templates, str):
        return guard_template(templates, bos_token).text
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        return [
            {**entry, "template": _guard_all(entry["template"], bos_token)} if "template" in entry else entry
            for entry in templates
        ]
    return templates


def bos_text(settings: Mapping[str, Any]) -> str | None:
    """The text of bos_token in tokenizer_config.json: a string, or an added token with its content."""
    token = settings.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _guard_splits(template: str) -> tuple[str, int]:
    parts, at, count = [], 0, 0
    for found in _SET.finditer(template):
        if _GUARD.search(template[: found.start()]):
            continue
        # The same whitespace is taken away before and after, whether the reply is cut or not.
        condition = f"{{%{found['open']} if '</think>' in {found['text']} %}}"
        parts += [template[at : found.start()], condition, found[0], f"{{%- endif {found['close']}%}}"]
        at = found.end()
        count += 1
    return "".join([*parts, template[at:]]), count


def _literal(text: str) -> str:
    """A Jinja string. Jinja reads the escapes of Python, of which JSON's are a part."""
    return f"'{text}'" if text.isprintable() and "'" not in text and "\\" not in text else json.dumps(text)
