"""Regular expressions that strangers wrote, in recipe files and in quantization_config, searched in bounded time."""

import re
from dataclasses import dataclass, field
from time import thread_time

import regex

from streamquant.quant.errors import UsageError

MAX_SECONDS = 5.0
"""CPU time that all matches of one pattern may take. Those that people write take some microseconds a name."""


@dataclass(slots=True)
class Pattern:
    """A regular expression and the time that is left to it.

    One that backtracks without end, `(.|.)*[XY]`, would hang Python's `re`; the `regex` package, which transformers
    builds on, can be told when to stop.
    """

    text: str
    where: str
    """Where it stands, for messages."""
    _compiled: "regex.Pattern[str]" = field(repr=False)
    _left: float = field(default_factory=lambda: MAX_SECONDS)

    def search(self, text: str) -> bool:
        """Whether it is found anywhere in `text`. Raises UsageError when its time is up."""
        return self._find(text, anywhere=True)

    def match(self, text: str) -> bool:
        """Whether it is found at the beginning of `text`. Raises UsageError when its time is up."""
        return self._find(text, anywhere=False)

    def _find(self, text: str, anywhere: bool) -> bool:
        began = thread_time()
        find = self._compiled.search if anywhere else self._compiled.match
        try:
            found = find(text, timeout=max(self._left, 1e-3))
        except TimeoutError as error:
            raise UsageError(
                "pattern takes too long",
                where=self.where,
                found=f"{self.text!r:.200} in {text!r:.200}",
                required=f"all its matches within {MAX_SECONDS:.0f} s",
                hint="repetitions within repetitions, like (.|.)*, try every way to split a name",
            ) from error
        self._left -= thread_time() - began
        return found is not None


def compile_pattern(text: str, where: str, ascii_only: bool = False) -> Pattern:
    """A pattern as Python's `re` reads it; `ascii_only`: \\w and its like know ASCII alone.

    Raises re.error where Python does, and for what it and the `regex` package read differently.

    >>> compile_pattern(r"re_proj|[qk]_proj$", "--tensor-type").search("blk.q_proj")
    True
    >>> compile_pattern("(", "--tensor-type")
    Traceback (most recent call last):
    re.error: missing ), unterminated subpattern at position 0
    """
    try:
        re.compile(text)  # what is wrong in its words
        if brace := re.search(r"(?<!\\)\{(?!\d*,?\d*\})", text):
            raise re.error("a brace that counts nothing", text, brace.start())
        return Pattern(text, where, regex.compile(text, regex.VERSION0 | (regex.ASCII if ascii_only else 0)))
    except (regex.error, OverflowError, RecursionError) as error:
        raise re.error(str(error)) from error
