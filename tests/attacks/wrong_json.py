"""Every way in which the JSON of a record can be wrong: each field at each depth, and the text itself."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

WRONG: tuple[object, ...] = (
    None, True, 0, -1, 2**63, 10**400, 1.5, 1e308, math.nan, math.inf, "", "x", [], [None], {}, {"a": 1},
)  # fmt: skip
"""What stands in place of a value."""
WRONG_TEXTS = ("\ud800", "\0", "../x", "/x", "x" * 5000, "\x1b[2J")
"""What stands in place of a text, too."""
_TWICE = "\N{REPLACEMENT CHARACTER}twice"
Place = tuple[str | int, ...]


def places(value: object) -> list[Place]:
    """Every key of every kind of object, which its keys tell; of lists the first item."""
    seen: set[object] = set()
    found: list[Place] = []

    def look(value: object, at: Place) -> None:
        if isinstance(value, dict):
            kind = tuple(sorted(value))
            for key, inner in value.items():
                if (kind, key) not in seen:
                    found.append((*at, key))
                    seen.add((kind, key))
                look(inner, (*at, key))
        elif isinstance(value, list) and value:
            if at not in seen:
                found.append((*at, 0))
                seen.add(at)
            look(value[0], (*at, 0))

    look(value, ())
    return found


def of(value: Any, place: Place) -> Any:
    """What stands at a place."""
    for step in place:
        value = value[step]
    return value


def put(record: Any, place: Place, value: object) -> Any:
    """A copy with another value at a place."""
    if not place:
        return value
    changed = copy.copy(record)
    changed[place[0]] = put(record[place[0]], place[1:], value) if len(place) > 1 else value
    return changed


def wrong_records(record: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the record): another value at each place, a key that is gone, one that is new."""
    for place in ((), *places(record)):
        found = of(record, place)
        if place:
            for value in (*WRONG, *(WRONG_TEXTS if isinstance(found, str) else ())):
                if value != found or type(value) is not type(found):
                    yield f"{place} = {str(value)[:40]!r}", put(record, place, value)
            without = copy.copy(of(record, place[:-1]))
            del without[place[-1]]
            yield f"{place} is gone", put(record, place[:-1], without)
        if isinstance(found, dict):
            yield f"{place} has one more", put(record, place, {**found, "one more": 1})
            yield f"{place} has a long key", put(record, place, {**found, "x" * 5000: next(iter(found.values()), 1)})
        elif isinstance(found, list) and found:
            yield f"{place} has its last twice", put(record, place, [*found, found[-1]])


def wrong_texts(record: Any, indent: int | None = 1) -> Iterator[tuple[str, bytes]]:
    """(what is wrong, the file): keys that occur twice, an end after a line, letters that are not UTF-8."""
    for place in places(record):
        if isinstance(place[-1], str):
            inner = of(record, place[:-1])
            twice = put(record, place[:-1], {**inner, place[-1] + _TWICE: inner[place[-1]]})
            text = json.dumps(twice, indent=indent, ensure_ascii=False).replace(_TWICE, "")
            yield f"{place} occurs twice", text.encode()
    text = json.dumps(record, indent=indent, ensure_ascii=False)
    lines = text.encode().splitlines(keepends=True)
    for number in range(0, len(lines), 1 + len(lines) // 50):
        yield f"{number} lines", b"".join(lines[:number])
    for number in range(0, len(text), 1 + len(text) // 20):
        yield f"not UTF-8 at {number}", text[:number].encode() + b"\xff" + text[number:].encode()
    yield "deep", b"[" * 100_000
    if ": 1" in text:
        yield "a number of 5,000 digits", text.replace(": 1", ": " + "1" * 5000, 1).encode()
