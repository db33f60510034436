"""Sizes as users write and read them, and long lists as they read them."""

import re
from collections.abc import Sequence

from streamquant.quant.errors import UsageError


def parse_size(text: str, where: str) -> int:
    """Bytes of a size as llama.cpp writes it: decimal, with K, M, G or T. Raises UsageError, which names `where`.

    >>> parse_size("45G", "--split-max-size")
    45000000000
    """
    match = re.fullmatch(r"([1-9][0-9]{0,14})([KMGT]?)B?", text.strip().upper())
    if match is None:
        required = "a number of at most 15 digits with K, M, G or T, like 40G"
        raise UsageError("not a size", where=where, found=f"{text!r:.100}", required=required)
    exponent = " KMGT".index(match[2] or " ")
    return int(match[1]) * int(1000**exponent)


def short_size(count: int) -> str:
    """The inverse of `parse_size`.

    >>> short_size(40_000_000_000), short_size(1234)
    ('40G', '1234')
    """
    for unit, scale in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if count and count % scale == 0:
            return f"{count // scale}{unit}"
    return str(count)


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and the Hub count them.

    >>> human_bytes(431_234_567_890), human_bytes(999)
    ('431.23 GB', '999 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def shortened(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first `most` names, and how many more there are.

    >>> shortened(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
