"""The calls to the Hub that run, so that its client's waits and silences are said to the one who listens to them."""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from streamquant.files.listener import Listener


@dataclass(slots=True, eq=False)
class Call:
    """One attempt of a call, which may be many requests of the Hub's client."""

    what: str
    """What is being done, in words."""
    listener: Listener
    stop: threading.Event | None
    """Ends waits when it is set."""
    requests: int = 0
    """How many questions it asked."""
    received: int = 0
    """Bytes of the answers to them."""
    pages: set[str] = field(default_factory=set)
    """Addresses of the next pages of a list, as answers named them."""


_own: ContextVar[Call | None] = ContextVar("_own", default=None)
_running: list[Call] = []


@contextlib.contextmanager
def calling(what: str, listener: Listener, stop: threading.Event | None) -> Iterator[Call]:
    """A call runs inside `with`."""
    call = Call(what, listener, stop)
    token = _own.set(call)
    _running.append(call)
    try:
        yield call
    finally:
        _running.remove(call)
        _own.reset(token)


def current() -> Call | None:
    """The call that this thread works for: its own, or for a thread of the client's the one that began last.

    None: a request is none of ours but of a program that uses the same client.
    """
    own = _own.get()
    if own is not None:
        return own
    with contextlib.suppress(IndexError):
        return _running[-1]
    return None
