"""Errors of the Hub's client: what the user reads, what is tried again, and that no token is in it."""

import json
import threading
import time
from email.utils import formatdate
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils._validators import validate_repo_id

from streamquant.hub import errors
from streamquant.hub.errors import DamagedBody, Retrying, ask, explain, is_transient, retry_after, scrub, with_retries
from streamquant.hub.http_library import httpx
from streamquant.quant.errors import StreamquantError, UsageError
from tests.listeners import Hears

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
URL = "https://hub.invalid/api/models/ORG/NAME"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def answered(
    status: int, *, token: bool = True, body: str = "", asked: tuple[str, str] = ("GET", URL), **headers: str
) -> HfHubHTTPError:
    """The client's exception for an answer of the Hub, or of a storage that it refers to."""
    method, url = asked
    request = httpx.Request(method, url, headers={"Authorization": f"Bearer {TOKEN}"} if token else {})
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(status, request=request, headers=names, text=body)
    with pytest.raises(HfHubHTTPError) as raised:
        hf_raise_for_status(response)
    return raised.value


def wrapped(error: Exception, around: Exception) -> Exception:
    """As the client hands on an error of a thread."""
    try:
        raise around from error
    except Exception as outer:  # the one that was just raised
        return outer


def used_closed() -> Exception:
    """Of a request on a client that another thread has closed."""
    client = httpx.Client()
    client.close()
    with pytest.raises(RuntimeError) as raised:
        client.get(URL)
    return raised.value


POST = ("POST", URL)
CDN = ("GET", "https://cdn.invalid/x?Signature=SECRET")
PUT = ("PUT", "https://storage.invalid/x?Signature=SECRET")
CONNECT = httpx.ConnectError("[Errno 111] Connection refused")
CERTIFICATE = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

EXPLAINED: dict[str, tuple[Exception, str]] = {
    "401 without token": (answered(401, token=False), "repository not found, or private"),
    "404": (answered(404, x_error_code="RepoNotFound"), "repository not found, or private"),
    "401 bad token": (
        answered(401, x_error_message="Invalid credentials in Authorization header"), "the token was refused"
    ),
    "403 gated": (answered(403, x_error_code="GatedRepo", token=False), "the repository is gated"),
    "403 disabled": (
        answered(403, x_error_message="Access to this resource is disabled."), "the repository was disabled"
    ),
    "404 revision": (answered(404, x_error_code="RevisionNotFound"), "no such revision"),
    "404 file": (answered(404, x_error_code="EntryNotFound"), "no such file in the repository"),
    "403 read only": (
        answered(403, body='{"error": "you must use a write token"}', asked=POST), "the token may not do this"
    ),
    "403 while reading": (answered(403), "the Hub does not let this be read"),
    "403 while reading, without token": (answered(403, token=False), "the Hub does not let this be read"),
    "403 quota": (
        answered(403, body='{"error": "Private storage quota exceeded"}', asked=POST), "the account's storage"
    ),
    "403 of a reader's limit": (answered(403, body='{"error": "limit"}'), "the Hub does not let this be read"),
    "402": (answered(402, asked=POST), "the account's storage"),
    "402 while reading": (answered(402), "the Hub refused the request"),
    "413": (answered(413, body='{"error": "limit"}', asked=POST), "the account's storage"),
    "413 while reading": (answered(413, body='{"error": "limit"}'), "the Hub refused the request"),
    "403 of a CDN": (answered(403, token=False, asked=CDN), "the download was refused by the Hub's storage"),
    "401 of a storage": (answered(401, token=False, asked=CDN), "the download was refused by the Hub's storage"),
    "403 of a storage": (
        answered(403, token=False, body="storage limit", asked=PUT), "the upload was refused by the Hub's storage"
    ),
    "409": (answered(409), "somebody else changed the repository"),
    "412": (answered(412), "somebody else changed the repository"),
    "429": (answered(429), "the Hub limits how often it is asked"),
    "500": (answered(500), "the Hub has a fault"),
    "503": (answered(503), "the Hub has a fault"),
    "400": (answered(400, body='{"error": "bad path"}'), "the Hub refused the request"),
    "offline": (OfflineModeIsEnabled("offline"), "the Hub is switched off"),
    "no token": (LocalTokenNotFoundError("no token"), "no token for the Hub"),
    "refused": (CONNECT, "the Hub cannot be reached"),
    "timeout": (httpx.ReadTimeout("timed out"), "the Hub cannot be reached"),
    "certificate": (CERTIFICATE, "the certificate of the Hub is not trusted"),
    "wrapped": (wrapped(CONNECT, LocalEntryNotFoundError("locate")), "the Hub cannot be reached"),
    "not cached": (LocalEntryNotFoundError("nothing there"), "not in the local cache"),
    "damaged": (DamagedBody("5 of 9 bytes"), "what arrived is not what the Hub holds"),
    "short body": (OSError("Consistency check failed: file should be of size 9"), "what arrived is not what the Hub"),
    "protocol": (httpx.UnsupportedProtocol("ftp"), "the Hub refers to an address that cannot be fetched"),
    "not JSON": (json.JSONDecodeError("Expecting value", "<html>", 0), "the Hub has a fault"),
    "unknown": (ValueError("never seen"), "the Hub's client failed"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_the_user_reads(name: str) -> None:
    error, expected = EXPLAINED[name]
    told = explain(error, "ORG/NAME", "reading config.json")
    assert str(told).startswith(expected)
    assert TOKEN not in str(told)
    assert "ORG/NAME (reading config.json)" in str(told)


@pytest.mark.parametrize("token", ["hf_\u00e4bcdefgh", "hf_ab cdefgh", "\u201chf_abcdefgh\u201d"])
def test_a_token_that_no_header_can_hold(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UnicodeEncodeError) as raised:
        "hf_\u00e4bcdefgh".encode("ascii")
    told = str(explain(raised.value, "ORG/NAME", "reading config.json"))
    assert told.startswith("the token cannot be sent")
    assert "ORG/NAME" in told
    assert "bcdefgh" not in told


@pytest.mark.parametrize("name", EXPLAINED)
def test_readers_are_not_told_of_write_tokens_and_storage(name: str) -> None:
    error, _ = EXPLAINED[name]
    told = str(explain(error, "ORG/NAME", "reading config.json"))
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None or response.request.method == "GET":
        assert "write" not in told
        assert "storage on the Hub is used up" not in told


def test_what_a_storage_refuses_has_a_new_address_a_few_times() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise answered(403, token=False, asked=CDN)

    with pytest.raises(HfHubHTTPError):
        with_retries(call, "reading")
    assert len(calls) == errors.REFUSALS


def test_what_the_hub_itself_refuses_is_not_tried_again() -> None:
    for error in (answered(403), answered(403, x_error_code="GatedRepo", asked=CDN), answered(404, asked=CDN)):
        assert not errors.refused_by_storage(error)


def test_a_name_that_cannot_be_one_is_a_wrong_command() -> None:
    with pytest.raises(HFValidationError) as raised:
        validate_repo_id("a/b/c")
    told = explain(raised.value, "a/b/c", "reading")
    assert isinstance(told, UsageError)
    assert told.exit_code == 2


def test_a_gated_repository_says_where_to_ask() -> None:
    told = str(explain(answered(403, x_error_code="GatedRepo", token=False), "ORG/NAME@main", "reading"))
    assert "/ORG/NAME, then run `hf auth login`" in told
    assert issubclass(GatedRepoError, HfHubHTTPError)


def test_an_error_of_ours_stays_as_it_is() -> None:
    ours = StreamquantError("a file changed")
    assert explain(wrapped(ours, RuntimeError("Error while uploading")), "ORG/NAME", "uploading") is ours


def test_the_request_id_is_told_for_support() -> None:
    assert "(request Root=1-2)" in str(explain(answered(500, x_request_id="Root=1-2"), "ORG/NAME", "reading"))


SECRETS: dict[str, str] = {
    "bearer": f"headers Authorization: Bearer {TOKEN}",
    "token alone": f"the token {TOKEN} is bad",
    "another token": "hf_ZYXWVUTSRQPONMLKJIHGFEDCBA and api_org_ABCDEFGHIJKLMNOP",
    "json": f'{{"authorization": "Bearer {TOKEN}"}}',
    "credentials in a URL": f"https://user:{TOKEN}@hub.invalid/x",
    "signed URL": "PUT https://s3.invalid/x?X-Amz-Signature=SECRETSECRET&X-Amz-Credential=SECRETSECRET failed",
}


@pytest.mark.parametrize("name", SECRETS)
def test_no_secret_is_told(name: str) -> None:
    for text in (scrub(SECRETS[name]), str(explain(ValueError(SECRETS[name]), "ORG/NAME", "reading"))):
        for secret in (TOKEN, TOKEN[3:], "ZYXWVUTSRQ", "ABCDEFGHIJKLMNOP", "SECRETSECRET"):
            assert secret not in text


def test_a_token_of_another_form_is_known_by_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-a-mirror-1234")
    assert "mirror-1234" not in scrub("bad credentials: of-a-mirror-1234")


def test_what_a_server_says_stays_on_a_line() -> None:
    told = str(explain(answered(500, body='{"error": "a\\u001b[2Jb\\n\\nerror: all is well"}'), "ORG/NAME", "reading"))
    assert "\x1b" not in told
    assert "\nerror" not in told
    assert len(scrub("x" * 5000)) == 400


# Trying again


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_pass(status: int) -> None:
    assert is_transient(answered(status))


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 410, 412, 416, 501])
def test_statuses_that_do_not(status: int) -> None:
    assert not is_transient(answered(status))


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (CONNECT, True),
        (httpx.ReadError("reset"), True),
        (httpx.WriteTimeout("slow"), True),
        (httpx.RemoteProtocolError("peer closed connection"), True),
        (ConnectionResetError("reset"), True),
        (DamagedBody("short"), True),
        (json.JSONDecodeError("Expecting value", "<html>", 0), True),
        (OSError("Consistency check failed: file should be of size 9"), True),
        (wrapped(answered(503), RuntimeError("Error while uploading 'x' to the Hub.")), True),
        (wrapped(answered(403), RuntimeError("Error while uploading 'x' to the Hub.")), False),
        (RuntimeError("CAS: connection reset by peer"), True),
        (wrapped(used_closed(), RuntimeError("Error while uploading 'x' to the Hub.")), True),
        (CERTIFICATE, False),
        (OfflineModeIsEnabled("offline"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("x"), False),
        (StreamquantError("x"), False),
    ],
)
def test_errors_that_pass(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


class Flaky:
    """Fails with each error in turn, then gives 7."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return 7


def test_a_call_is_repeated_until_it_succeeds() -> None:
    waits: list[tuple[str, float]] = []
    flaky = Flaky(answered(503), CONNECT, DamagedBody("short"))
    assert with_retries(flaky, "reading", Retrying(Hears(waiting=lambda *wait: waits.append(wait)))) == 7
    assert flaky.calls == 4
    assert [message for message, _ in waits] == [
        "reading: 503 Service Unavailable", "reading: [Errno 111] Connection refused", "reading: short"
    ]  # fmt: skip
    assert all(0.0005 * 2**k <= seconds <= 0.0015 * 2**k for k, (_, seconds) in enumerate(waits))


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamquant.hub.errors.ATTEMPTS", 3)
    flaky = Flaky(*[answered(503)] * 9)
    with pytest.raises(HfHubHTTPError):
        with_retries(flaky, what="reading")
    assert flaky.calls == 3


def test_not_what_stays() -> None:
    flaky = Flaky(answered(403, asked=POST))
    with pytest.raises(StreamquantError, match="the token may not do this"):
        ask(flaky, repo="ORG/NAME", what="writing")
    assert flaky.calls == 1


def test_other_statuses_on_request() -> None:
    assert with_retries(Flaky(answered(412)), what="writing", how=Retrying(also=frozenset({412}))) == 7


def test_waits_as_long_as_the_server_asks() -> None:
    waits: list[float] = []
    flaky = Flaky(answered(429, Retry_After=["0", "2"][0]), answered(503, Retry_After="1"))
    before = time.monotonic()
    with_retries(flaky, "reading", Retrying(Hears(waiting=lambda _message, seconds: waits.append(seconds))))
    assert waits[1] >= 1
    assert time.monotonic() - before >= 1


def test_but_not_for_hours() -> None:
    flaky = Flaky(answered(429, Retry_After="7200"))
    with pytest.raises(HfHubHTTPError):
        with_retries(flaky, what="reading")


@pytest.mark.parametrize("headers", [{"Retry_After": "3600"}, {}])
def test_a_limit_of_an_hour_is_waited_out_where_others_work_meanwhile(
    headers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that names no time: the Hub counts commits by the hour."""
    waits: list[float] = []
    monkeypatch.setattr("streamquant.hub.errors.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("streamquant.hub.errors.random.uniform", lambda _low, _high: 1.0)
    how = Retrying(Hears(waiting=lambda _message, seconds: waits.append(seconds)), patient=True)
    failures = [answered(429, asked=POST, **headers)] * (1 if headers else errors.ATTEMPTS - 1)
    assert with_retries(Flaky(*failures), "uploading", how) == 7
    assert sum(waits) >= 3600
    with pytest.raises(HfHubHTTPError):
        with_retries(Flaky(answered(429, asked=POST, Retry_After="86400")), "uploading", how)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry_After": "7000"}, 7000.0),
        ({"Retry_After": formatdate(time.time() + 3600, usegmt=True)}, 3600.0),
        ({"Retry_After": formatdate(time.time() - 3600, usegmt=True)}, 0.0),
        ({"Retry_After": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=5500'}, 5500.0),
        ({}, None),
    ],
)
def test_what_the_server_asks(headers: dict[str, Any], expected: float | None) -> None:
    found = retry_after(answered(429, **headers))
    assert found == (None if expected is None else pytest.approx(expected, abs=900))


def test_a_stop_ends_a_wait() -> None:
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    before = time.monotonic()
    with pytest.raises(HfHubHTTPError):
        with_retries(Flaky(answered(429, Retry_After="60")), what="reading", how=Retrying(stop=stop))
    assert time.monotonic() - before < 5
