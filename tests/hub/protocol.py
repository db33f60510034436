"""Requests and answers as the routes see them, and the table that the routes enter themselves in."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.hub.blobs import Blob
from tests.hub.record import Request
from tests.hub.repos import Token

if TYPE_CHECKING:
    from tests.hub.hub import Hub


class HubError(Exception):
    """An answer that is an error: the Hub's X-Error-Code and X-Error-Message, which the client turns into classes."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


@dataclass(slots=True)
class Answer:
    """A status, headers and a body: bytes, or the range start..stop of a blob."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    blob: Blob | None = None
    start: int = 0
    stop: int = 0

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.blob is None else self.stop - self.start

    def chunks(self, stop: int) -> Iterator[bytes | memoryview]:
        """The first `stop` bytes of the body, in pieces."""
        if self.blob is None:
            yield self.body[:stop]
        else:
            yield from self.blob.chunks(self.start, self.start + stop)


@dataclass(slots=True)
class Call:
    """A request that a route answers."""

    hub: "Hub"
    host: str
    method: str
    raw_path: str  # as it came, still quoted, without the query
    query_text: str
    headers: Message
    record: Request
    stream: Callable[[], Iterator[bytes]]  # the body, in pieces; once
    groups: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        """Parameters of the query."""
        return parse_qs(self.query_text, keep_blank_values=True)

    def flag(self, name: str) -> bool:
        """Whether a parameter is set: "1", "true", "True"."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def read(self) -> bytes:
        """The whole body."""
        if self.body is None:
            self.body = b"".join(self.stream())
        return self.body

    def json(self) -> Any:
        """The body as JSON. Raises HubError 400."""
        try:
            return json.loads(self.read() or b"{}")
        except ValueError as error:
            raise HubError(400, f"malformed JSON: {error}") from error

    @property
    def token(self) -> Token | None:
        """Who asks; None: nobody in particular. Raises HubError 401 for a token that the Hub does not know."""
        return self.hub.authenticate(self.headers.get("Authorization"))


Route = Callable[[Call], Answer]
ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = []

KIND = r"(?P<kind>models|datasets|spaces)"
REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


def route(method: str, pattern: str, host: str = "hub") -> Callable[[Route], Route]:
    """Enters a function as the answer to requests whose path matches; HEAD is answered as GET."""

    def enter(function: Route) -> Route:
        ROUTES.append((host, method, re.compile(pattern), function))
        return function

    return enter


def dispatch(call: Call) -> Answer:
    """The answer of the first route that matches. Raises HubError 404 where none does."""
    method = "GET" if call.method == "HEAD" else call.method
    for host, of_method, pattern, function in ROUTES:
        match = pattern.fullmatch(call.raw_path) if (host, of_method) == (call.host, method) else None
        if match:
            call.groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            return function(call)
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {call.method} {call.raw_path}")


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer in JSON."""
    return Answer(
        status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(value).encode()
    )


def error_answer(error: HubError) -> Answer:
    """An error as the Hub sends it."""
    headers = {"X-Error-Message": error.message.encode("ascii", "replace").decode(), **error.headers}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return json_answer({"error": error.message}, error.status, headers)


RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def ranged(blob: Blob, header: str | None, headers: dict[str, str]) -> Answer:
    """A blob, or the part of it that a Range header names: 200, 206 or 416. Several ranges at once: all of it."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match.groups() == ("", ""):
        return Answer(200, headers, blob=blob, stop=blob.size)
    first, last = match.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    stop = min(blob.size, int(last) + 1) if first and last else blob.size
    if start >= stop:
        return Answer(416, {**headers, "Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Answer(206, headers, blob=blob, start=start, stop=stop)
