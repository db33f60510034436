"""What was asked of the Hub: one record per request, in memory and, when a file is named, as JSON lines."""

import fnmatch
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

SETTLE_SECONDS = 2.0


@dataclass(slots=True)
class Request:
    """A request and what became of it. Paths are unquoted, header names lower case."""

    host: str  # hub, cdn or stranger
    method: str
    path: str
    query: str
    headers: dict[str, str]
    started: float  # Unix time
    seconds: float = 0.0
    status: int | None = None  # None: no answer
    sent: int = 0  # bytes of the body of the answer that were handed to the network
    received: int = 0  # bytes of the body of the request
    repo: str | None = None
    file: str | None = None  # path in the repo, where the request is for the content of a file
    fault: bool = False
    done: bool = field(default=False)

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("range")

    @property
    def token(self) -> str | None:
        """The access token that came with the request."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


class Log:
    """The records, in the order in which the requests came."""

    def __init__(self, path: Path | None = None) -> None:
        self._requests: list[Request] = []
        self._changed = threading.Condition()
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    @contextmanager
    def record(self, request: Request) -> Iterator[Request]:
        """Holds the record of a request that is being answered."""
        with self._changed:
            self._requests.append(request)
        try:
            yield request
        finally:
            with self._changed:
                request.seconds = time.time() - request.started
                request.done = True
                if self._file is not None:
                    self._file.write(json.dumps(asdict(request)) + "\n")
                    self._file.flush()
                self._changed.notify_all()

    def requests(self) -> list[Request]:
        """All records. The client may be done a moment before its request is: waits for that, 2 s at most."""
        with self._changed:
            self._changed.wait_for(lambda: all(request.done for request in self._requests), SETTLE_SECONDS)
            return list(self._requests)

    def clear(self) -> None:
        """Forgets the requests that are done."""
        self.requests()
        with self._changed:
            self._requests[:] = [request for request in self._requests if not request.done]

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def select(requests: list[Request], *, method: str = "*", path: str = "*", host: str = "*") -> list[Request]:
    """The requests that match, as a fault would match them."""
    return [
        request
        for request in requests
        if method in ("*", request.method)
        and fnmatch.fnmatchcase(request.path, path)
        and fnmatch.fnmatchcase(request.host, host)
    ]


def sent_by_file(requests: list[Request]) -> Counter[str]:
    """Bytes of content sent, by path in the repo."""
    counter: Counter[str] = Counter()
    for request in requests:
        if request.file is not None:
            counter[request.file] += request.sent
    return counter
