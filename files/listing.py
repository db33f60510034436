"""Long lists in the text of notes and messages."""

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first `most` names, and how many more there are.

    >>> shortened(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
