"""Numbers and strangers' text for people: rounded to what is known, and escaped for Markdown and HTML."""

import math
import re

from streamquant.files.sizes import human_bytes
from streamquant.quant.printable import visible
from streamquant.validate.logits.divergence import Estimate

__all__ = ["code", "error_digits", "estimate", "human_bytes", "markdown", "number", "percent"]

MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; small numbers as powers of ten.

    >>> number(0.0123456), number(0.00000123), number(28.6123, 4), number(0.0), number(None)
    ('0.0123', '1.2e-06', '28.61', '0', '–')
    """
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "-∞"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def error_digits(value: float, error: float | None, scale: float = 1.0, at_least: int = 0) -> tuple[str, str]:
    """A value and its error with as many decimals as the error has two digits for; "" for no error.

    >>> error_digits(0.0307271, 0.00160), error_digits(0.9039, 0.0087, 100), error_digits(0.5, None)
    (('0.0307', '0.0016'), ('90.39', '0.87'), ('0.500', ''))
    """
    value *= scale
    if error is None or error * scale == 0 or not math.isfinite(error):
        return number(value), ""
    error *= scale
    decimals = max(at_least, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{value:.2e}", f"{error:.0e}"
    decimals = max(0, decimals)
    return f"{value:.{decimals}f}", f"{error:.{decimals}f}"


def estimate(found: Estimate, scale: float = 1.0) -> str:
    """A value and its standard error by chunk; where that is not known, the value alone.

    >>> estimate(Estimate(0.0307271, 0.001, 0.0016)), estimate(Estimate(0.9039, 0.001, 0.0087), 100)
    ('0.0307 ± 0.0016', '90.39 ± 0.87')
    """
    value, error = error_digits(found.value, found.error_by_chunk, scale)
    return f"{value} ± {error}" if error else value


def percent(value: float | None, digits: int = 3) -> str:
    """A share as percent.

    >>> percent(0.98333), percent(-0.0001), percent(1.0)
    ('98.3%', '-0.0100%', '100%')
    """
    return MISSING if value is None else f"{number(100 * value, digits)}%" if value != 1 else "100%"


# Strangers' text


_SPECIAL = re.compile(r"[\\`*_\[\]|~#!$&<>@]|://|(?<=www)\.")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "://": ":&#47;/", ".": "&#46;"}
"""What would be HTML, or a link although nothing marks it as one."""


class Markdown(str):
    """Text that is Markdown already, and is not escaped again."""

    __slots__ = ()


def markdown(text: object) -> str:
    """Any text as plain text of Markdown, on one line: no markup, no HTML, no links, no borders of cells.

    >>> markdown("a|b*c <script>"), markdown(Markdown("**x**"))
    ('a\\\\|b\\\\*c &lt;script&gt;', '**x**')
    """
    if isinstance(text, Markdown):
        return text
    line = visible(" ".join(str(text).split("\n")))
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0]) or f"\\{found[0]}", line)


def code(text: object) -> Markdown:
    """Any text as a code span of Markdown, also within a table.

    >>> code("Q4_K_M"), code("a`b|c"), code("<b>")
    ('`Q4_K_M`', '``a`b\\\\|c``', '`<b>`')
    """
    line = visible(str(text)) or " "
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|"))
