"""Faults of the Hub as our client sees them: answers without an end, silence, waits, lists that lead elsewhere."""

import gzip
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_session, hf_hub_download

from streamquant.files.listener import Listener
from streamquant.files.worker import Stopped
from streamquant.hub import client, errors
from streamquant.hub.client import TIMEOUT, set_up_client
from streamquant.hub.errors import Retrying, ask
from streamquant.hub.http_library import httpx
from streamquant.hub.repo import open_repo
from streamquant.hub.target import Destination, Target
from streamquant.quant.errors import StreamquantError
from tests.hub import WRITE_TOKEN, Fault, Hub, rate_limit
from tests.hub.client import client_put_back
from tests.hub.protocol import ROUTES, Answer, Call, Route, json_answer

REPO = "ORG/M"
LIST = r"/api/models/ORG/M/tree/main"


class Heard(Listener):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, float]] = []
        self.notes: list[str] = []

    def waiting(self, what: str, seconds: float) -> None:
        self.waits.append((what, seconds))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def ours(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our client, for a Hub with one small repository; no wait takes its time."""
    hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": bytes(100_000)})
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setattr(errors, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(errors, "ATTEMPTS", 2)
    monkeypatch.setattr(client, "wait", lambda _seconds, _stop: None)
    with client_put_back():
        set_up_client()
        yield


@pytest.fixture
def answer() -> Iterator[Callable[..., None]]:
    """Let a function answer a path of the Hub."""
    before = list(ROUTES)

    def put(pattern: str, function: Route, method: str = "GET") -> None:
        ROUTES.insert(0, ("hub", method, re.compile(pattern), function))

    yield put
    ROUTES[:] = before


def target(heard: Heard | None = None) -> Target:
    return Target(HfApi(), Destination(REPO, pull_title="A pull request"), heard or Heard())


def look_for_pull(heard: Heard) -> object:
    place = target(heard)
    return place._ask("looking for the pull request", place._find_pull)


CALLS: dict[str, tuple[str, Callable[[Heard], object]]] = {
    "model info": (r"/api/models/ORG/M/revision/main", lambda heard: open_repo(REPO, listener=heard)),
    "a page of a tree": (LIST, lambda heard: target(heard).holds()),
    "a repository's info": (r"/api/models/ORG/M", lambda heard: target(heard).exists()),
    "whoami": (r"/api/whoami-v2", look_for_pull),
    "discussions": (r"/api/models/ORG/M/discussions", look_for_pull),
}
"""What is asked of the Hub by GET: path, and a call that asks it."""
by_call = pytest.mark.parametrize("name", CALLS)


# Size


@by_call
def test_an_answer_has_a_bounded_size(name: str, answer: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, call = CALLS[name]
    monkeypatch.setattr(client, "MOST_BYTES", 100_000)
    body = b"[" + b" " * 30_000_000 + b"]"
    answer(pattern, lambda _: Answer(200, {"Content-Type": "application/json"}, body))
    tracemalloc.start()
    with pytest.raises(StreamquantError, match="the Hub's answer is too large") as raised:
        call(Heard())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5_000_000
    assert re.search(pattern, raised.value.where or "")
    assert raised.value.required == "at most 100.00 kB"


@pytest.mark.parametrize("kind", ["commit", "preupload"])
def test_an_answer_to_what_is_written_has_one_too(kind: str, answer: Callable[..., None]) -> None:
    answer(rf"/api/models/ORG/M/{kind}/main", lambda _: Answer(200, {}, bytes(client.MOST_BYTES + 1)), "POST")
    with pytest.raises(StreamquantError, match="the Hub's answer is too large"):
        ask(lambda: HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=REPO), repo=REPO, what="")


def test_a_compressed_answer_is_refused(answer: Callable[..., None], hub: Hub) -> None:
    packed = gzip.compress(bytes(1 << 20))
    answer(LIST, lambda _: Answer(200, {"Content-Encoding": "gzip"}, packed))
    with pytest.raises(StreamquantError, match="compressed though it was asked not to be"):
        target().holds()
    assert hub.select(path="*/tree/*")[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [307, 404])
def test_what_comes_with_redirects_and_errors_is_not_read_whole(
    status: int, answer: Callable[..., None], hub: Hub
) -> None:
    headers = {"Location": "/api/models/ORG/M/tree/other"} if status == 307 else {}
    answer(LIST, lambda _: Answer(status, headers, bytes(40_000_000)))
    with pytest.raises(StreamquantError, match="no such revision" if status == 307 else "not found"):
        ask(lambda: list(HfApi().list_repo_tree(REPO)), repo=REPO, what="listing what is there")
    assert hub.select(path="*/tree/main")[0].sent < 20_000_000  # what lay in the buffers of the connection


def test_content_of_files_is_not_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 10_000)
    path = ask(lambda: hf_hub_download(REPO, "model.safetensors", local_dir=tmp_path), repo=REPO, what="")
    assert Path(path).stat().st_size == 100_000


def test_other_programs_in_the_process_have_the_client_as_it_is(
    answer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 10)
    answer(LIST, lambda _: Answer(200, {}, b" " * 100 + b"[]"))
    assert list(HfApi().list_repo_tree(REPO)) == []


# Silence


@by_call
def test_a_hub_that_says_nothing_is_told_and_given_up(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, call = CALLS[name]
    heard = Heard()
    monkeypatch.setattr(client, "TIMEOUT", httpx.Timeout(0.25, connect=1))
    monkeypatch.setattr(client, "SILENCE", 0.1)
    hub.arm(Fault(path=pattern, delay=0.6, times=None))
    began = time.monotonic()
    with pytest.raises(StreamquantError, match="the Hub cannot be reached"):
        call(heard)
    assert time.monotonic() - began < 5
    assert any(re.search(r": no answer from 127\.0\.0\.1 for \d+ s$", note) for note in heard.notes)
    assert [what for what, _ in heard.waits if "timed out" in what]


def test_the_next_page_has_time_outs_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.page_size = 1
    monkeypatch.setattr(client, "TIMEOUT", httpx.Timeout(0.2, connect=1))
    fault = hub.arm(Fault(path="*/tree/*", skip=1, delay=0.4, times=1))
    heard = Heard()
    assert len(target(heard).holds()) == 2
    assert fault.fired
    assert heard.waits == [("listing what is there: timed out", 1.0)]


def test_a_byte_now_and_then_is_no_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(client, "SILENCE", 0.1)
    hub.arm(Fault(path="*/revision/main", trickle=40, times=None))
    heard = Heard()
    with pytest.raises(StreamquantError, match="the Hub cannot be reached") as raised:
        open_repo(REPO, listener=heard)
    assert "bytes of an answer in 0 s" in str(raised.value.found)
    assert heard.notes
    assert heard.waits


def test_every_request_has_time_outs(hub: Hub) -> None:
    seen = []
    get_session().event_hooks["request"].append(lambda request: seen.append(request.extensions["timeout"]))
    open_repo(REPO).read_range("model.safetensors", 0, 10)
    target().holds()
    target().look_up(["config.json"])
    assert len(seen) >= 5
    assert all(seconds is not None for timeout in seen for seconds in timeout.values())
    assert TIMEOUT.read == 60


# Waits of the client itself


def test_waits_of_the_client_are_said_with_reason_and_seconds(hub: Hub) -> None:
    hub.page_size = 1
    hub.arm(rate_limit(7, path="*/tree/*", skip=1))
    hub.arm(Fault(path="*/tree/*", skip=1, status=503, times=2))
    hub.arm(Fault(path="*/tree/*", skip=1, hang_up=True))
    heard = Heard()
    assert len(target(heard).holds()) == 2
    assert [seconds for _, seconds in heard.waits] == [8.0, 2, 4, 8]
    assert [what for what, _ in heard.waits[:2]] == [
        "listing what is there: 429 Too Many Requests",
        "listing what is there: 503 Service Unavailable",
    ]
    assert "Server disconnected" in heard.waits[3][0]


def test_a_download_that_breaks_off_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.arm(Fault(host="cdn", cut_after=50_000))
    heard = Heard()
    ask(
        lambda: hf_hub_download(REPO, "model.safetensors", local_dir=tmp_path),
        repo=REPO,
        what="fetching model.safetensors",
        how=Retrying(heard),
    )
    assert [seconds for _, seconds in heard.waits] == [1]
    assert heard.waits[0][0].startswith("fetching model.safetensors: peer closed connection")


def test_a_server_that_asks_for_too_much_patience_is_not_waited_for(hub: Hub) -> None:
    hub.page_size = 1
    hub.arm(rate_limit(100_000, path="*/tree/*", skip=1))
    heard = Heard()
    with pytest.raises(StreamquantError, match="limits how often it is asked"):
        target(heard).holds()
    assert heard.waits == []


def test_a_stop_ends_a_wait_of_the_client(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    stop = threading.Event()
    stop.set()
    began = time.monotonic()
    with pytest.raises(Stopped):
        client.wait(30, stop)
    assert time.monotonic() - began < 1


# Lists


def page(following: str | None) -> Answer:
    headers = {} if following is None else {"Link": f'<{following}>; rel="next"'}
    return json_answer([], headers=headers)


def test_a_page_that_leads_back_to_itself(answer: Callable[..., None], hub: Hub) -> None:
    answer(LIST, lambda _: page(f"{hub.endpoint}{LIST}?cursor=1"))
    with pytest.raises(StreamquantError, match="the Hub's list has no end") as raised:
        target().holds()
    assert raised.value.found == "a page that leads back to itself"
    assert len(hub.select(path="*/tree/*")) == 2


def test_pages_in_a_circle(answer: Callable[..., None], hub: Hub) -> None:
    def turn(call: Call) -> Answer:
        number = int(call.query.get("cursor", ["0"])[0])
        return page(f"{hub.endpoint}{LIST}?cursor={(number + 1) % 3}")

    answer(LIST, turn)
    with pytest.raises(StreamquantError, match="the Hub's list has no end"):
        target().holds()
    assert len(hub.select(path="*/tree/*")) <= 5


def test_pages_without_an_end(answer: Callable[..., None], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_REQUESTS", 20)
    answer(LIST, lambda call: page(f"{hub.endpoint}{LIST}?cursor={int(call.query.get('cursor', ['0'])[0]) + 1}"))
    with pytest.raises(StreamquantError, match="the Hub's list has no end") as raised:
        target().holds()
    assert raised.value.found == "21 pages"


def test_pages_of_discussions_without_an_end(answer: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_REQUESTS", 20)
    answer(r"/api/models/ORG/M/discussions", lambda _: json_answer({"discussions": [], "count": 9, "start": 0}))
    with pytest.raises(StreamquantError, match="the Hub's list has no end"):
        look_for_pull(Heard())


def test_pages_that_are_too_much_together(
    answer: Callable[..., None], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MOST_BYTES_OF_CALL", 100_000)

    def large(call: Call) -> Answer:
        number = int(call.query.get("cursor", ["0"])[0])
        answer = page(f"{hub.endpoint}{LIST}?cursor={number + 1}")
        answer.body = b" " * 30_000 + answer.body
        return answer

    answer(LIST, large)
    with pytest.raises(StreamquantError, match="the Hub's answer is too large"):
        target().holds()
    assert len(hub.select(path="*/tree/*")) == 4


def test_a_page_elsewhere_gets_no_token(answer: Callable[..., None], hub: Hub) -> None:
    answer(LIST, lambda _: page(f"{hub.urls['stranger']}/page"))
    with pytest.raises(StreamquantError):
        target().holds()
    assert [request.token for request in hub.select(host="stranger")][:1] == [None]
    assert hub.leaked_tokens() == []


def test_a_page_of_the_same_list_after_a_fault_is_no_circle(hub: Hub) -> None:
    hub.page_size = 1
    hub.arm(Fault(path="*/tree/*", short_by=5))
    hub.arm(Fault(path="*/tree/*", skip=1, status=500))
    assert len(target(Heard()).holds()) == 2


def test_deep_json_is_one_error(answer: Callable[..., None]) -> None:
    answer(LIST, lambda _: Answer(200, {}, b"[" * 200_000))
    with pytest.raises(StreamquantError, match=r"the Hub's client failed|the Hub has a fault"):
        target().holds()
