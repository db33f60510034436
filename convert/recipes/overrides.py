"""What a user says about single tensors, with llama-quantize's spellings: --tensor-type, --pure and the like.

The order in which they count is that of llama_tensor_get_type (src/llama-quant.cpp, llama.cpp 11434) and is in
convert/recipes/mix.py; here they are parsed and checked.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES

from streamquant.convert.recipes.patterns import Pattern, compile_pattern
from streamquant.quant.errors import UsageError
from streamquant.quant.formats import FORMATS

GGML_TYPES: Mapping[str, int] = {
    kind.name: block for kind, (block, _) in GGML_QUANT_SIZES.items() if not re.fullmatch(r"[IF]\d+|Q8_[1K]", kind.name)
} | {"F32": 1, "F16": 1}
"""The types that a tensor of weights can have in a GGUF -> weights of a block."""
MAX_BYTES = 1024 * 1024
"""Largest file of options that is read."""
MAX_PATTERN = 1000
"""Longest pattern; tensor names have at most 64 characters."""


@dataclass(frozen=True)
class Overrides:
    """Formats that are not left to the file type."""

    tensor_types: tuple[tuple[str, str], ...] = ()
    """(pattern, GGML type) in order; the first whose pattern is found in a tensor's GGUF name counts."""
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    """The file type's own format everywhere."""
    leave_output_tensor: bool = False
    """output.weight as in the source."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """GGUF name -> GGML type; stands above everything else. Only recipe files have it."""

    def __bool__(self) -> bool:
        """Whether anything is overridden."""
        return self != NO_OVERRIDES

    @cached_property
    def _compiled(self) -> tuple[tuple[Pattern, str], ...]:
        return tuple((compile_ecmascript(pattern), name) for pattern, name in self.tensor_types)

    def match(self, name: str) -> tuple[str, str] | None:
        """(pattern, type) of the first pattern found in a GGUF name."""
        return next(((pattern.text, kind) for pattern, kind in self._compiled if pattern.search(name)), None)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The patterns that are found in none of the names, and the exact names that are not among them."""
        names = list(names)
        patterns = [pattern.text for pattern, _ in self._compiled if not any(map(pattern.search, names))]
        return [*patterns, *(name for name in self.tensors if name not in names)]

    def record(self) -> dict[str, Any]:
        """As in a recipe file, what is not overridden left out; `parse_overrides` is the inverse."""
        record: dict[str, Any] = {
            "tensor-type": [f"{pattern}={name}" for pattern, name in self.tensor_types],
            "output-tensor-type": self.output_tensor_type,
            "token-embedding-type": self.token_embedding_type,
            "pure": self.pure,
            "leave-output-tensor": self.leave_output_tensor,
            "tensors": dict(self.tensors),
        }
        return {key: value for key, value in record.items() if value}

    def words(self) -> list[str]:
        """As on a command line.

        >>> Overrides((("attn_v", "Q8_0"),), pure=True).words()
        ['--tensor-type', 'attn_v=Q8_0', '--pure']
        """
        words: list[str] = []
        for name, value in self.record().items():
            if isinstance(value, list):
                words += [word for item in value for word in (f"--{name}", str(item))]
            elif value is True:
                words.append(f"--{name}")
            elif isinstance(value, str):
                words += [f"--{name}", value]
        return words


NO_OVERRIDES = Overrides()

_TEXTS, _SWITCHES = ("output-tensor-type", "token-embedding-type"), ("pure", "leave-output-tensor")


def parse_overrides(record: Mapping[str, Any], at: Callable[[str], str]) -> Overrides:
    """The overrides of a recipe file or a manifest; other keys are left alone.

    `at` names the place of a key in messages. Raises UsageError for a value of the wrong kind, an unknown type or a bad
    pattern.
    """
    found = {key: record.get(key) for key in ("tensor-type", *_TEXTS, *_SWITCHES, "tensors")}
    for key in _SWITCHES:
        if found[key] is not None and not isinstance(found[key], bool):
            raise UsageError("not a switch", where=at(key), found=repr(found[key]), required="true or false")
    rules, exact = found["tensor-type"] or [], found["tensors"] or {}
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise UsageError(
            "not a list of rules",
            where=at("tensor-type"),
            found=f"{rules!r:.200}",
            required="lines of REGEX=TYPE",
        )
    if not isinstance(exact, dict) or not all(isinstance(name, str) for name in exact):
        raise UsageError(
            "not a table of tensors", where=at("tensors"), found=f"{exact!r:.200}", required="lines of NAME: TYPE"
        )
    output, embedding = (None if found[key] is None else parse_type(found[key], at(key)) for key in _TEXTS)
    return Overrides(
        tuple(parse_rule(rule, at("tensor-type")) for rule in rules),
        output,
        embedding,
        bool(found["pure"]),
        bool(found["leave-output-tensor"]),
        {name: parse_type(kind, f"{at('tensors')}, {name}") for name, kind in exact.items()},
    )


def parse_rule(text: str, where: str = "--tensor-type") -> tuple[str, str]:
    """REGEX=TYPE -> (pattern, type). The pattern ends at the first "=" and is lower-cased, as in llama-quantize.

    Raises UsageError if there is no such pair, for an unknown type or a pattern that does not compile.

    >>> parse_rule("blk\\\\.[0-3]\\\\.FFN_down=q6_k")
    ('blk\\\\.[0-3]\\\\.ffn_down', 'Q6_K')
    """
    pattern, equals, name = text.strip().partition("=")
    if not pattern or not equals or not name:
        raise UsageError("not a rule", where=where, found=f"{text!r:.200}", required="REGEX=TYPE, like attn_v=q8_0")
    pattern = pattern.lower()
    compile_ecmascript(pattern, where)
    return pattern, parse_type(name, where)


def read_rules(path: Path) -> tuple[tuple[str, str], ...]:
    """The rules of a --tensor-type-file: REGEX=TYPE, separated by white space. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError("file too large", where=str(path), required=f"at most {MAX_BYTES:,} bytes")
        return tuple(parse_rule(word, str(path)) for word in content.decode().split())
    except OSError as error:
        raise UsageError("cannot read a file", where=str(path), found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise UsageError("not a text file", where=str(path), found=str(error)) from error


def parse_type(name: object, where: str) -> str:
    """The name of a GGML type in any case -> as in FORMATS. Raises UsageError for one that cannot be made.

    >>> parse_type("q4_k", "--output-tensor-type")
    'Q4_K'
    """
    known = [kind for kind in GGML_TYPES if kind in FORMATS]
    found = name.strip().upper() if isinstance(name, str) else name
    if found not in known:
        what = "type cannot be made yet" if found in GGML_TYPES else "unknown type"
        raise UsageError(what, where=where, found=f"{name!r:.100}", required=", ".join(known))
    return str(found)


def compile_ecmascript(pattern: str, where: str = "--tensor-type") -> Pattern:
    """An ECMAScript pattern as llama-quantize takes it.

    Python's agree with it on all that is of use in a tensor's name; what only one of them knows is refused. Raises
    UsageError.
    """
    try:
        if len(pattern) > MAX_PATTERN:
            raise re.error(f"longer than {MAX_PATTERN} characters")
        if only_python := re.search(r"\(\?(?![:=!])|\\[az]|[*+?}]\+", pattern):
            raise re.error(f"{only_python[0]!r} is not ECMAScript")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # [[:alpha:]], which Python reads otherwise
            return compile_pattern(pattern, where, ascii_only=True)
    except (re.error, FutureWarning) as error:
        raise UsageError(
            "pattern does not compile", where=where, found=f"{pattern!r:.200}: {error}", required="an ECMAScript regex"
        ) from error
