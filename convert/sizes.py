"""Sizes as users write them."""

import re

from quant.errors import UsageError


def parse_size(text: str, where: str) -> int:
    """Bytes of a size as llama.cpp writes it: decimal, with K, M, G or T. Raises UsageError, which names `where`.

    >>> parse_size("45G", "--split-max-size")
    45000000000
    """
    match = re.fullmatch(r"([1-9]\d*)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise UsageError("not a size", where=where, found=repr(text), required="a number with K, M, G or T, like 40G")
    exponent = " KMGT".index(match[2] or " ")
    return int(match[1]) * int(1000**exponent)
