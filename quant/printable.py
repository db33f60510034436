"""Strangers' text, made safe to show: names, keys and values of files can hold escape sequences of terminals."""

import re
import unicodedata

_PERHAPS = re.compile(r"[^ -~]")
"""Everything but the printable characters of ASCII, which most texts consist of."""


def hides(letter: str) -> bool:
    """Whether a character is none that is seen: control (C0, C1), format (bidi, zero width), surrogate, unassigned, or
    a separator of lines that is not LF. Categories of Unicode: C, Zl, Zp.
    """
    category = unicodedata.category(letter)
    return category[0] == "C" or category in ("Zl", "Zp")


def visible(text: object) -> str:
    """One line: characters that are not seen become escapes, so that nothing hides or turns around other text.

    >>> visible("a\\u202eb\\x1b[31m\\n"), visible("né 字 😀")
    ('a\\\\u202eb\\\\x1b[31m\\\\n', 'né 字 😀')
    """
    return _PERHAPS.sub(lambda found: _escape(found[0]) if hides(found[0]) else found[0], str(text))


def visible_lines(text: object) -> str:
    """The same for several lines: LF and tabs stay.

    >>> visible_lines("a\\tb\\nc\\r\\x9b2J")
    'a\\tb\\nc\\\\r\\\\x9b2J'
    """
    return _PERHAPS.sub(
        lambda found: _escape(found[0]) if hides(found[0]) and found[0] not in "\n\t" else found[0], str(text)
    )


def visible_json(text: str) -> str:
    r"""JSON whose texts are free of characters that are not seen; it means the same.

    >>> visible_json('["\x7f\u202e\U000e0041é"]')
    '["\\u007f\\u202e\\udb40\\udc41é"]'
    """
    return _PERHAPS.sub(
        lambda found: _json_escape(found[0]) if hides(found[0]) and found[0] != "\n" else found[0], text
    )


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _json_escape(letter: str) -> str:
    pair = letter.encode("utf-16-be", errors="surrogatepass").hex()
    return "".join(f"\\u{pair[at : at + 4]}" for at in range(0, len(pair), 4))
