"""The Hub's client as we need it: answers of bounded size, time-outs, no silent waits, the token for the Hub alone.

All requests of huggingface_hub go through one httpx.Client, which it lets others make (`set_client_factory`). Ours
heeds the call that a request belongs to (`streamquant.hub.calls`); requests of other programs in the same process are
sent as the client's own would send them. What file contents are bounded by is said where they are read (`repo.py`).
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, constants, file_download, get_token, hf_raise_for_status, set_client_factory
from huggingface_hub.utils import _http
from huggingface_hub.utils._http import hf_request_event_hook
from huggingface_hub.utils.tqdm import disable_progress_bars

from streamquant.files.sizes import human_bytes
from streamquant.files.worker import Stopped, Worker
from streamquant.hub.calls import Call, current
from streamquant.hub.errors import LONGEST_RETRY_AFTER, scrub
from streamquant.hub.http_library import httpx
from streamquant.quant.errors import StreamquantError

TIMEOUT = httpx.Timeout(60.0, connect=30.0)
"""Seconds without a byte until a question is given up; the client's own default is never."""
WRITE_TIMEOUT = httpx.Timeout(300.0, connect=30.0)
"""The same where something is changed: the Hub looks at all files of a commit before it answers."""
ANSWER_SECONDS = 300.0
"""Seconds that the whole answer to a question may take: a byte now and then is no answer."""
SILENCE = 10.0
"""Seconds without an answer after which that is said; again after two, four, ... times as many."""
MOST_BYTES = 32 << 20
"""Bytes of an answer, 130,000 files of a repository. Its objects in Python take up to twenty times that."""
MOST_BYTES_OF_CALL = 4 * MOST_BYTES
"""Bytes of the answers of one call, which may be many pages."""
MOST_REQUESTS = 1000
"""Questions of one call; a page of a list has 1,000 files."""
MOST_BYTES_BESIDE = 1 << 20
"""Bytes that are read of a redirect and of a page that tells of an error."""
MOST_PACKED_BESIDE = 64 << 10
"""The same where they are compressed, up to a thousand times."""
_BOUNDED = "streamquant.bounded"
"""The extension of a request whose answer is read into memory."""
_faults = threading.local()
"""`text`: what went wrong at the last request of a thread."""


def connect(*, to_write: bool = True) -> HfApi:
    """The Hub's client, quiet and with time-outs.

    Raises StreamquantError in offline mode and, `to_write`, without a token.
    """
    where = constants.ENDPOINT
    if constants.is_offline_mode():
        raise StreamquantError(
            "the Hub is switched off", where=where, found="HF_HUB_OFFLINE=1", hint="unset HF_HUB_OFFLINE to upload"
        )
    if to_write and get_token() is None and "HF_OIDC_RESOURCE" not in os.environ:
        raise StreamquantError(
            "no token for the Hub",
            where=where,
            required="a token with write access",
            hint="run `hf auth login`, or set HF_TOKEN",
        )
    set_up_client()
    return HfApi(library_name="streamquant")


@functools.cache
def set_up_client() -> None:
    """Once in a process: a new factory closes the connections of all threads."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it tries again is told by us, without URLs
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    set_client_factory(_new_client)
    for module in (_http, file_download):
        module.time = _Clock()  # type: ignore[attr-defined] # the module `time`, of which they use `sleep`


def _new_client() -> httpx.Client:
    """As huggingface_hub.utils._http, default_client_factory, has it, and ours."""
    hooks: dict[str, list[Any]] = {"request": [hf_request_event_hook, _before], "response": [_after]}
    return _Client(event_hooks=hooks, follow_redirects=True, timeout=None)


class _Clock:
    """In place of the module `time` in huggingface_hub: its waits between attempts are said, bounded and stoppable."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Wait. Raises Stopped, and HfHubHTTPError if a server asks for too much patience."""
        call = current()
        if call is None:
            time.sleep(seconds)
            return
        response: httpx.Response | None = getattr(_faults, "response", None)
        if seconds > LONGEST_RETRY_AFTER and response is not None:
            hf_raise_for_status(response)
        call.listener.waiting(f"{call.what}: {getattr(_faults, 'text', 'no answer')}", seconds)
        wait(seconds, call.stop)


def wait(seconds: float, stop: threading.Event | None) -> None:
    """Wait so long. Raises Stopped soon after `stop` is set."""
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped


class _Client(httpx.Client):
    """The one client; what it adds is said at the top of this file."""

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """See httpx.Client.send."""
        call = current()
        if call is None:
            return super().send(request, stream=stream, **options)
        _fill_timeouts(request)
        if stream:
            with _remembering_faults():
                return _noted(super().send(request, stream=True, **options))
        request.extensions = {**request.extensions, _BOUNDED: True}
        request.headers["Accept-Encoding"] = "identity"
        with _remembering_faults(), _watched(call, request):
            response = super().send(request, stream=False, **options)
        _count(call, response)
        return _noted(response)


def _fill_timeouts(request: httpx.Request) -> None:
    """A time-out wherever the client has none: HfApi.model_info and paginate ask for that."""
    default = (TIMEOUT if request.method in ("GET", "HEAD") else WRITE_TIMEOUT).as_dict()
    given = {key: value for key, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions = {**request.extensions, "timeout": {**default, **given}}


@contextlib.contextmanager
def _remembering_faults() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        _remember(scrub(str(error)) or type(error).__name__)
        raise


def _noted(response: httpx.Response) -> httpx.Response:
    if response.status_code >= 400:
        _remember(f"{response.status_code} {response.reason_phrase}".strip(), response)
    return response


def _remember(text: str, response: httpx.Response | None = None) -> None:
    _faults.text, _faults.response = text, response


# Around a request, and around each that a redirect makes of it


def _before(request: httpx.Request) -> None:
    """The token goes to the Hub itself alone, also where a list says that its next page is elsewhere."""
    if current() is None or "authorization" not in request.headers or _is_endpoint(request.url):
        return
    issuer = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")  # asked with a token of its own (_oidc.py of the client)
    if not issuer or httpx.URL(issuer).host != request.url.host:
        del request.headers["authorization"]


def _is_endpoint(url: httpx.URL) -> bool:
    try:
        hub = httpx.URL(constants.ENDPOINT)
    except httpx.InvalidURL:
        return False
    return (url.scheme, url.host, url.port) == (hub.scheme, hub.host, hub.port)


def _after(response: httpx.Response) -> None:
    """Bound the body of an answer before it is read."""
    if current() is None:
        return
    into_memory = _BOUNDED in response.request.extensions
    encoded = response.headers.get("content-encoding", "identity").lower() != "identity"
    if response.has_redirect_location or response.status_code >= 400:
        response.stream = _Body(response, beside=MOST_PACKED_BESIDE if encoded else MOST_BYTES_BESIDE)
    elif into_memory and encoded:
        raise StreamquantError(
            "the Hub's answer is compressed though it was asked not to be",
            where=_where(response),
            found=scrub(response.headers["content-encoding"]),
            hint="check the network, proxy and HF_ENDPOINT",
        )
    else:
        response.stream = _Body(response, into_memory=into_memory)


class _Body(httpx.SyncByteStream):
    """The bytes of an answer as they arrive, of a redirect or an error page the first `beside` of them."""

    def __init__(self, response: httpx.Response, *, beside: int | None = None, into_memory: bool = False) -> None:
        assert isinstance(response.stream, httpx.SyncByteStream), "the client is not asynchronous"
        self._response, self._stream = response, response.stream
        self._beside, self._into_memory = beside, into_memory

    def __iter__(self) -> Iterator[bytes]:
        received, deadline = 0, time.monotonic() + ANSWER_SECONDS
        with _remembering_faults():
            for piece in self._stream:
                received += len(piece)
                if self._beside is not None and received > self._beside:
                    return
                if self._into_memory and received > MOST_BYTES:
                    raise _too_large(self._response, MOST_BYTES)
                if self._into_memory and time.monotonic() > deadline:
                    text = f"{received:,} bytes of an answer in {ANSWER_SECONDS:.0f} s"
                    raise httpx.ReadTimeout(text, request=self._response.request)
                yield piece

    def close(self) -> None:
        """See httpx.SyncByteStream.close."""
        self._stream.close()


def _count(call: Call, response: httpx.Response) -> None:
    """The bounds of a whole call. Raises StreamquantError for a list without an end."""
    if response.request.method not in ("GET", "HEAD"):
        return
    call.requests += 1
    call.received += len(response.content)
    if call.received > MOST_BYTES_OF_CALL:
        raise _too_large(response, MOST_BYTES_OF_CALL)
    following = response.links.get("next", {}).get("url")
    if call.requests > MOST_REQUESTS or (following is not None and following in call.pages):
        raise StreamquantError(
            "the Hub's list has no end",
            where=_where(response),
            found=f"{call.requests:,} pages" if call.requests > MOST_REQUESTS else "a page that leads back to itself",
            required=f"at most {MOST_REQUESTS:,} pages",
            hint="check the network, proxy and HF_ENDPOINT",
        )
    if following is not None:
        call.pages.add(following)


def _too_large(response: httpx.Response, most: int) -> StreamquantError:
    return StreamquantError(
        "the Hub's answer is too large",
        where=_where(response),
        required=f"at most {human_bytes(most)}",
        hint="check HF_ENDPOINT; a repository of more than a hundred thousand files cannot be listed",
    )


def _where(response: httpx.Response) -> str:
    call = current()
    return f"{call.what}, {scrub(str(response.request.url))}" if call is not None else str(response.request.url)


# A request that takes its time


class _Sent(httpx.SyncByteStream):
    """The body of a request, which knows when a piece of it was taken last."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream, self.last = stream, time.monotonic()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self.last = time.monotonic()
            yield piece

    def close(self) -> None:
        """See httpx.SyncByteStream.close."""
        self._stream.close()


@contextlib.contextmanager
def _watched(call: Call, request: httpx.Request) -> Iterator[None]:
    """Say that no answer comes, and for how long."""
    assert isinstance(request.stream, httpx.SyncByteStream), "the client is not asynchronous"
    request.stream = sent = _Sent(request.stream)
    over = threading.Event()

    def watch() -> None:
        patience = SILENCE
        while not over.wait(max(0.01, sent.last + patience - time.monotonic())):
            silent = time.monotonic() - sent.last
            if silent < SILENCE:  # a large file goes out, piece by piece
                patience = SILENCE
            elif silent >= patience:
                call.listener.note(f"{call.what}: no answer from {scrub(request.url.host)} for {silent:.0f} s")
                patience *= 2

    Worker(watch, "watching a request").start()
    try:
        yield
    finally:
        over.set()
