"""What the Hub's client raises, as messages for the user; and when to ask again.

    explain(error, repo, what)     any exception of huggingface_hub, httpx or hf_xet -> StreamquantError
    with_retries(call, what=...)   again after time-outs, resets, 5xx, 429, damaged bodies, and a few times after a
                                   storage refused a signed address; nothing else

No message holds a token: whatever the client or the server says is scrubbed.
"""

import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streamquant.files.listener import SILENT, Listener
from streamquant.hub.calls import calling
from streamquant.hub.http_library import httpx
from streamquant.quant.errors import StreamquantError, UsageError

T = TypeVar("T")

ATTEMPTS = 8
"""Times that a call is tried; with the waits between them about two minutes, beside those of the client itself."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; each next wait is twice as long."""
LONGEST_WAIT = 60.0
"""Seconds that a wait is never longer than, unless the server names a time."""
LONGEST_RETRY_AFTER = 900.0
"""Seconds: a server that asks for more patience than this is not waited for."""
LONGEST_LIMIT = 7200.0
"""The same where a limit on how often something is done is waited out: the Hub counts commits by the hour."""
LIMIT_WAIT = 60.0
"""Seconds of the first wait for such a limit that names no time; each next wait is twice as long, up to
LONGEST_RETRY_AFTER."""
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
REFUSALS = 4
"""Times that a storage may refuse a signed address: each attempt asks the Hub for a new one."""
REFUSED_STATUS = frozenset({400, 401, 403, 410})
"""What storages answer to a signed address that has expired: CloudFront and S3 403, Google's 400, Azure's 401."""
_PLAIN = (HfHubHTTPError, BadRequestError)
"""The client's errors that say no more than the status."""
_SHOWN = 400
_LOGIN = "run `hf auth login`, or set HF_TOKEN"
_UNSENDABLE = re.compile(r"[^\x21-\x7e]")
"""What a header of HTTP cannot hold in a token."""
_SECRETS = (
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9_]{4,}"), r"\1_***"),
    (re.compile(r"(?i)\b(authorization\s*[:=]\s*)\S+(\s+\S+)?"), r"\1***"),
    (re.compile(r"(?i)\b(bearer\s+)\S+"), r"\1***"),
    (re.compile(r"(https?://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),  # a signed URL is as good as a token
)


class DamagedBody(Exception):  # noqa: N818 - not an error yet: the next attempt may bring the right bytes
    """What arrived is not what was promised: too short, another size, another hash. Worth another attempt."""


def scrub(text: str) -> str:
    """`text` on one line without tokens, credentials, signed queries and control characters; at most 400 characters."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from: the client wraps errors of the network in its own."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer behind an exception, or None."""
    response = _response(error)
    return response.status_code if response is not None else None


def _response(error: BaseException) -> httpx.Response | None:
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError | httpx.HTTPStatusError):
            return cause.response
    return None


def _is_of_hub(url: httpx.URL) -> bool:
    """Whether an address is one of the Hub itself, not of a storage or CDN that it refers to."""
    try:
        hub = httpx.URL(constants.ENDPOINT)
    except httpx.InvalidURL:
        return True
    return (url.host, url.port) == (hub.host, hub.port) or url.host in getattr(constants, "HF_URL_HOSTS", ())


def refused_by_storage(error: BaseException) -> bool:
    """Whether another host than the Hub refused an address that the Hub had signed: it may have expired.

    A mirror may lead to the Hub itself: what that refuses has an error code or a class of its own.
    """
    response = _response(error)
    if response is not None:
        plain = all(type(cause) in _PLAIN for cause in causes(error) if isinstance(cause, HfHubHTTPError))
        coded = "x-error-code" in response.headers
        return plain and not coded and response.status_code in REFUSED_STATUS and not _is_of_hub(response.request.url)
    # hf_xet tells of its storage in words alone
    return any(type(cause) is RuntimeError and re.search(r"\b40[13]\b", str(cause)) for cause in causes(error))


def _writes(response: httpx.Response) -> bool:
    """Whether a request was to change something at the Hub. A redirect may have made a GET of it."""
    first = response.history[0] if response.history else response
    return first.request.method not in ("GET", "HEAD")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a little later.

    True for time-outs, resets and refused connections, statuses 408, 425, 429, 500, 502, 503 and 504, and bodies that
    are too short or have another hash. False for certificates, offline mode and everything the user has to mend.
    """
    chain = list(causes(error))
    if any(isinstance(cause, StreamquantError | OfflineModeIsEnabled | KeyboardInterrupt) for cause in chain):
        return False
    if any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in chain):
        return False
    for cause in chain:
        if isinstance(cause, HfHubHTTPError | httpx.HTTPStatusError):
            return cause.response.status_code in TRANSIENT_STATUS
        if isinstance(cause, httpx.TimeoutException | httpx.NetworkError | httpx.RemoteProtocolError):
            return True
        if isinstance(cause, DamagedBody | ConnectionError | TimeoutError | json.JSONDecodeError):
            return True  # a page of a proxy in place of JSON: the client reads answers before it looks at their status
        if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
            return True  # huggingface_hub/file_download.py, http_get: the body was shorter than its header said
        if type(cause) is RuntimeError and re.search(
            r"(?i)timed? ?out|connection|reset by peer|\b50[0234]\b|client has been closed", str(cause)
        ):
            # hf_xet speaks of its network in RuntimeErrors. And a refused connection of one thread makes
            # huggingface_hub close the client of them all (utils/_http.py, _http_backoff_base).
            return True
    return False


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait: the headers Retry-After (seconds or date) or ratelimit ("t="); or None."""
    response = _response(error)
    if response is None:
        return None
    text = response.headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    if text:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            pass
    if response.status_code == 429:
        limit = re.search(r"\bt\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
        return float(limit[1]) if limit else None
    return None


@dataclass(frozen=True, slots=True)
class Retrying:
    """What a call that is tried again heeds."""

    listener: Listener = SILENT
    """Hears what failed, and for how many seconds is waited."""
    stop: threading.Event | None = None
    """Ends a wait when it is set; then nothing is tried again."""
    also: frozenset[int] = frozenset()
    """Statuses that are tried again beside the transient errors."""
    patient: bool = False
    """Wait out a limit (429) of an hour: others work meanwhile."""


def with_retries(call: Callable[[], T], what: str, how: Retrying | None = None) -> T:
    """Call until it succeeds, at most ATTEMPTS times, waiting longer each time.

    The wait is FIRST_WAIT * 2^k seconds, at most LONGEST_WAIT, times 0.5 to 1.5 by chance, so that many clients do not
    come back at once; never less than the server's Retry-After. `what` is what is being done, in words. Only transient
    errors (`is_transient`), the statuses `how.also` and, REFUSALS times, refusals of a storage are tried again; the
    last error is raised as it came, for `explain`.
    """
    how, refusals = how or Retrying(), 0
    for attempt in range(ATTEMPTS):
        try:
            with calling(what, how.listener, how.stop):
                return call()
        except Exception as error:
            asked = retry_after(error)
            last = attempt == ATTEMPTS - 1 or (how.stop is not None and how.stop.is_set())
            refusals += refused_by_storage(error)
            expired = refused_by_storage(error) and refusals < REFUSALS
            again = is_transient(error) or status_of(error) in how.also or expired
            if last or not again or (asked or 0) > (LONGEST_LIMIT if how.patient else LONGEST_RETRY_AFTER):
                raise
            first, longest = FIRST_WAIT, LONGEST_WAIT
            if how.patient and asked is None and status_of(error) == 429:
                first, longest = LIMIT_WAIT, LONGEST_RETRY_AFTER
            wait = min(longest, first * 2**attempt) * random.uniform(0.5, 1.5)
            seconds = max(asked or 0.0, wait)
            how.listener.waiting(f"{what}: {_short(error)}", seconds)
            if how.stop is None:
                time.sleep(seconds)
            elif how.stop.wait(seconds):
                raise
    raise AssertionError("ATTEMPTS is at least 1")


def ask(call: Callable[[], T], *, repo: str, what: str, how: Retrying | None = None) -> T:
    """`with_retries`, and what is left of errors explained. Raises StreamquantError."""
    try:
        return with_retries(call, what, how)
    except StreamquantError:
        raise
    except Exception as error:
        raise explain(error, repo, what) from None  # the cause may hold a request with its token


def _short(error: BaseException) -> str:
    """An error in a few words."""
    response = _response(error)
    if response is not None:
        return f"{response.status_code} {response.reason_phrase}".strip()
    cause = next((cause for cause in causes(error) if isinstance(cause, httpx.HTTPError | DamagedBody)), error)
    return scrub(str(cause)) or type(cause).__name__


def _server_says(error: BaseException, response: httpx.Response) -> str:
    """Status and message of the server, and the request's id for its publisher's support."""
    message = next(
        (c.server_message for c in causes(error) if isinstance(c, HfHubHTTPError) and c.server_message), None
    )
    message = message or response.headers.get("x-error-message", "")
    text = f"{response.status_code} {response.reason_phrase}".strip() + (f": {scrub(message)}" if message else "")
    request_id = response.headers.get("x-request-id")
    return f"{text} (request {scrub(request_id)})" if request_id else text


def explain(error: BaseException, repo: str, what: str) -> StreamquantError:
    """The error of a call to the Hub as a message for the user.

    `repo` is ORG/NAME, with @REVISION where that matters; `what` is what was being done, in words: "reading the
    shards' headers". A name that cannot be one gives a UsageError. The message holds no token.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, StreamquantError):
            return cause
    where = f"{repo} ({what})"
    if found := next((cause for cause in chain if isinstance(cause, HFValidationError)), None):
        return UsageError(
            "not the name of a repository",
            where=repo,
            found=scrub(str(found)),
            required="ORG/NAME, of letters, digits, '-', '_' and '.'",
        )
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return StreamquantError(
            "the Hub is switched off",
            where=where,
            found="HF_HUB_OFFLINE=1, and what is needed is not in the local cache",
            hint="unset HF_HUB_OFFLINE, or fetch the repository into the cache first",
        )
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in chain):
        return _no_token(where)
    response = _response(error)
    if response is not None:
        return _explain_answer(error, response, repo, where)
    if _UNSENDABLE.search(get_token() or ""):
        return StreamquantError(
            "the token cannot be sent",
            where=where,
            found="characters that no token has",
            required="hf_ and letters and digits, as the Hub's settings show it",
            hint="copy the token again: " + _LOGIN,
        )
    return _explain_network(error, chain, where)


def _no_token(where: str) -> StreamquantError:
    return StreamquantError("no token for the Hub", where=where, hint=_LOGIN)


def _explain_answer(error: BaseException, response: httpx.Response, repo: str, where: str) -> StreamquantError:
    """The Hub answered, and said no."""
    says, status = _server_says(error, response), response.status_code
    message = says.lower()
    with_token = "authorization" in response.request.headers
    kind = next((type(cause) for cause in causes(error) if isinstance(cause, HfHubHTTPError)), HfHubHTTPError)
    if issubclass(kind, GatedRepoError):
        return StreamquantError(
            "the repository is gated",
            where=where,
            found=says,
            required="a token of an account that was granted access",
            hint=f"ask for access on {constants.ENDPOINT}/{repo.split('@')[0]}"
            + ("" if with_token else f", then {_LOGIN}"),
        )
    if issubclass(kind, DisabledRepoError):
        return StreamquantError("the repository was disabled", where=where, found=says)
    if issubclass(kind, RevisionNotFoundError):
        return StreamquantError(
            "no such revision", where=where, found=says, required="a branch, a tag or a commit of the repository"
        )
    if issubclass(kind, RemoteEntryNotFoundError):
        return StreamquantError("no such file in the repository", where=where, found=says)
    if refused_by_storage(error):
        return _refused_by_storage(response, says, where)
    if status == 401 and with_token and "invalid" in message:
        return StreamquantError(
            "the token was refused",
            where=where,
            found=says,
            hint="make a new token in the Hub's settings and " + _LOGIN,
        )
    if issubclass(kind, RepositoryNotFoundError) or (status in (401, 404) and not with_token):
        return _not_found(where, says, with_token)
    if _writes(response) and (status == 402 or (status in (403, 413) and re.search(r"quota|storage|limit", message))):
        return StreamquantError(
            "the account's storage on the Hub is used up",
            where=where,
            found=says,
            hint="free some space or ask the Hub for more, then run the same command again",
        )
    if status == 403:
        return _forbidden(response, says, where)
    return _explain_status(response, says, where)


def _refused_by_storage(response: httpx.Response, says: str, where: str) -> StreamquantError:
    """A signed address was refused, also when it was new."""
    host = scrub(response.request.url.host)
    found = f"{says}, {REFUSALS} times, each with a new address"
    hint = (
        f"check that a firewall or proxy lets {host} through, and this machine's clock; "
        "then run the same command again: it continues where it stopped"
    )
    if _writes(response):
        return StreamquantError(
            "the upload was refused by the Hub's storage", where=f"{where}, to {host}", found=found, hint=hint
        )
    return StreamquantError(
        "the download was refused by the Hub's storage", where=f"{where}, from {host}", found=found, hint=hint
    )


def _forbidden(response: httpx.Response, says: str, where: str) -> StreamquantError:
    """403 of the Hub itself."""
    if _writes(response):
        return StreamquantError(
            "the token may not do this",
            where=where,
            found=says,
            required="a token with write access to this namespace",
            hint="make a token of the kind `write` (or a fine-grained one for this namespace) and " + _LOGIN,
        )
    with_token = "authorization" in response.request.headers
    return StreamquantError(
        "the Hub does not let this be read",
        where=where,
        found=says,
        hint="make a token of the kind `read` (or a fine-grained one that may read this repository) and " + _LOGIN
        if with_token
        else f"{_LOGIN}; a firewall or proxy between here and the Hub may answer so, too",
    )


def _not_found(where: str, says: str, with_token: bool) -> StreamquantError:
    if with_token:
        hint = "check the name; if it is private, the token must be of an account that may see it"
    else:
        hint = f"check the name; if it is private, {_LOGIN}"
    return StreamquantError("repository not found, or private", where=where, found=says, hint=hint)


def _explain_status(response: httpx.Response, says: str, where: str) -> StreamquantError:
    """An answer that only its status tells about."""
    status = response.status_code
    if status == 401:
        return StreamquantError("the token was refused", where=where, found=says, hint=_LOGIN)
    if status == 404:
        return StreamquantError("not found on the Hub", where=where, found=says)
    if status in (409, 412):
        return StreamquantError(
            "somebody else changed the repository at the same time",
            where=where,
            found=says,
            hint="run the same command again: it continues where it stopped",
        )
    if status == 429:
        return StreamquantError(
            "the Hub limits how often it is asked",
            where=where,
            found=says,
            hint="wait some minutes and run the same command again"
            + ("" if get_token() else f"; {_LOGIN}: limits are higher"),
        )
    if status >= 500:
        return StreamquantError(
            "the Hub has a fault",
            where=where,
            found=says,
            hint="run the same command again later: it continues where it stopped",
        )
    return StreamquantError("the Hub refused the request", where=where, found=says)


def _explain_network(error: BaseException, chain: list[BaseException], where: str) -> StreamquantError:
    """There was no answer, or half of one."""
    texts = " ".join(str(cause) for cause in chain)
    if "CERTIFICATE_VERIFY_FAILED" in texts:
        return StreamquantError(
            "the certificate of the Hub is not trusted",
            where=where,
            found=_short(error),
            hint="behind a company's proxy, set SSL_CERT_FILE to its certificates",
        )
    if any(isinstance(cause, httpx.UnsupportedProtocol | httpx.InvalidURL) for cause in chain):
        if constants.ENDPOINT.startswith(("http://", "https://")):
            return StreamquantError(
                "the Hub refers to an address that cannot be fetched",
                where=f"{where}, {scrub(constants.ENDPOINT)}",
                found=_short(error),
                required="https://",
                hint="check the network, proxy and HF_ENDPOINT: something there redirects elsewhere",
            )
        return UsageError(
            "not an address of a Hub",
            where="HF_ENDPOINT",
            found=scrub(constants.ENDPOINT),
            required="https://host, or unset",
        )
    if any(isinstance(cause, DamagedBody) for cause in chain) or "Consistency check failed" in texts:
        return StreamquantError(
            "what arrived is not what the Hub holds",
            where=where,
            found=_short(error),
            hint="run the same command again; if it persists, something between here and the Hub changes the bytes",
        )
    if any(isinstance(cause, httpx.HTTPError | ConnectionError | TimeoutError) for cause in chain):
        return StreamquantError(
            "the Hub cannot be reached",
            where=f"{where}, {scrub(constants.ENDPOINT)}",
            found=_short(error),
            hint="check the network, proxy and HF_ENDPOINT; then run the same command again",
        )
    if any(isinstance(cause, json.JSONDecodeError) for cause in chain):
        return StreamquantError(
            "the Hub has a fault",
            where=where,
            found="an answer that is not JSON",
            hint="run the same command again later",
        )
    if found := next((cause for cause in chain if isinstance(cause, FileMetadataError)), None):
        return StreamquantError(
            "what answers is not a Hub",
            where=f"{where}, {scrub(constants.ENDPOINT)}",
            found=scrub(str(found).partition(". ")[0]),
            hint="check the network, proxy and HF_ENDPOINT",
        )
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in chain):
        return StreamquantError(
            "not in the local cache", where=where, found=scrub(str(error)), hint="allow the network, or fetch it first"
        )
    if any(isinstance(cause, EntryNotFoundError) for cause in chain):
        return StreamquantError("no such file in the repository", where=where, found=scrub(str(error)))
    return StreamquantError(
        "the Hub's client failed",
        where=where,
        found="; ".join(dict.fromkeys(f"{type(cause).__name__}: {scrub(str(cause))}" for cause in chain)),
    )
