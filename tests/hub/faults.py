"""Faults on demand: what goes wrong, at which requests, how often.

A fault waits for requests whose host, method and path match, lets `skip` of them by, then fires `times` times (None:
for ever), each time with `probability`. The first fault in the order of arming that fires is the one that acts.

    hub.arm(Fault(method="GET", path="*model-00002*", host="cdn", cut_after=100_000))
    hub.arm(Fault(path="/api/*", status=503, times=3))
    hub.arm(rate_limit(seconds=1, path="*/tree/*"))
"""

import fnmatch
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass(slots=True)
class Fault:
    """A fault and the requests it waits for. Several effects can be joined (delay and status, trickle and cut)."""

    # Which requests
    method: str = "*"  # a method, or several: "PUT|POST"
    path: str = "*"  # fnmatch pattern over the unquoted path, without the query
    host: str = "*"  # hub or cdn; the stranger has no faults
    skip: int = 0
    times: int | None = 1
    probability: float = 1.0

    # What happens
    delay: float = 0.0  # seconds before anything is answered
    status: int | None = None  # answered instead of what was asked for
    headers: Mapping[str, str] = field(default_factory=dict)  # with `status`: its headers
    code: str | None = None  # with `status`: X-Error-Code
    message: str = "fault on demand"  # with `status`: X-Error-Message and the body
    applied: bool = False  # with `status`: the request is carried out, only the answer is lost
    hang_up: bool = False  # the connection is closed before the status line
    cut_after: int | None = None  # bytes of the body (of a PUT: of its own), then FIN
    reset_after: int | None = None  # the same, then RST
    short_by: int = 0  # bytes missing at the end of a body whose Content-Length is right
    shrink_by: int = 0  # bytes missing at the end of a body whose Content-Length agrees with that
    flip: tuple[int, ...] = ()  # offsets in the body (negative: from its end) of bytes with a wrong bit
    trickle: float | None = None  # bytes per second
    redirect: str | None = None  # "stranger", "cdn" or a URL: 307 to the same path there
    commit: Mapping[str, Mapping[str, str] | str] | None = None  # {"repo": ORG/NAME, "files": {path: text}} on main

    # What happened
    seen: int = 0
    fired: int = 0

    def matches(self, host: str, method: str, path: str) -> bool:
        """Whether the fault waits for such a request."""
        return (
            fnmatch.fnmatchcase(host, self.host)
            and (self.method == "*" or method in self.method.split("|"))
            and fnmatch.fnmatchcase(path, self.path)
        )

    @property
    def exhausted(self) -> bool:
        """Whether the fault has fired as often as it may."""
        return self.times is not None and self.fired >= self.times

    def body_limit(self, length: int) -> int:
        """How many bytes of a body of `length` bytes are sent before the connection ends."""
        limits = [limit for limit in (self.cut_after, self.reset_after) if limit is not None]
        return max(0, min([length - self.short_by, *limits]))

    def flipped(self, offset: int, chunk: bytes | memoryview, length: int) -> bytes | memoryview:
        """The piece of a body of `length` bytes that begins at `offset`, with the wrong bits that lie in it."""
        places = [place % length - offset for place in self.flip]
        places = [place for place in places if 0 <= place < len(chunk)]
        if not places:
            return chunk
        wrong = bytearray(chunk)
        for place in places:
            wrong[place] ^= 1
        return bytes(wrong)


NO_FAULT = Fault(times=0)


def parse_fault(values: Mapping[str, Any]) -> Fault:
    """A fault from a JSON object. Raises ValueError for a key that no fault has."""
    unknown = set(values) - {item.name for item in fields(Fault)}
    if unknown:
        raise ValueError(f"no such property of a fault: {', '.join(sorted(unknown))}")
    given = dict(values)
    if "flip" in given:
        given["flip"] = tuple(given["flip"])
    return Fault(**given)


class Faults:
    """The faults that are armed."""

    def __init__(self, seed: int = 0) -> None:
        self._armed: list[Fault] = []
        self._lock = threading.Lock()
        self._random = random.Random(seed)

    @property
    def armed(self) -> list[Fault]:
        """The faults in the order of arming, exhausted ones too."""
        with self._lock:
            return list(self._armed)

    def arm(self, fault: Fault) -> Fault:
        """Adds a fault; its `fired` tells later how often it acted."""
        self.extend([fault])
        return fault

    def extend(self, faults: list[Fault]) -> None:
        """Adds faults."""
        with self._lock:
            self._armed.extend(faults)

    def clear(self) -> None:
        """Removes all faults."""
        with self._lock:
            self._armed.clear()

    def take(self, host: str, method: str, path: str) -> Fault:
        """The fault that acts on this request, or NO_FAULT."""
        with self._lock:
            for fault in self._armed:
                if fault.exhausted or not fault.matches(host, method, path):
                    continue
                fault.seen += 1
                if fault.seen > fault.skip and self._random.random() < fault.probability:
                    fault.fired += 1
                    return fault
        return NO_FAULT


def rate_limit(seconds: int = 0, *, policy: bool = True, **matching: Any) -> Fault:
    """429. The client waits `seconds` + 1: by RateLimit headers, as the Hub sends them, or by Retry-After alone."""
    headers = {"Retry-After": str(seconds)}
    if policy:
        headers["RateLimit"] = f'"api";r=0;t={seconds}'
        headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    message = "We had to rate limit your IP."
    return Fault(status=429, headers=headers, message=message, **matching)


def refuse_token(**matching: Any) -> Fault:
    """401, as if the token had been revoked."""
    return Fault(status=401, message=INVALID_TOKEN, **matching)


def lost_commit(status: int = 500, **matching: Any) -> Fault:
    """A commit is applied, but answered with an error."""
    return Fault(method="POST", path="*/commit/*", status=status, applied=True, **matching)


def move_main(repo: str, files: Mapping[str, str], **matching: Any) -> Fault:
    """Before the request is answered, main of a repo gets a new commit with these text files."""
    return Fault(commit={"repo": repo, "files": files}, **matching)
