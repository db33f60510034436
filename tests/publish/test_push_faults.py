"""Push where something goes wrong on the way: nothing is lost, nothing is sent twice, and the message says it."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import close_session

from streamquant.files.worker import Stopped
from streamquant.hub import client as client_module
from streamquant.hub import errors
from streamquant.hub import target as target_module
from streamquant.hub.background import in_background
from streamquant.hub.client import connect
from streamquant.hub.http_library import httpx
from streamquant.hub.outgoing import Meter, MeteredFile, Outgoing
from streamquant.hub.target import Destination, Target
from streamquant.publish.upload import push as push_module
from streamquant.publish.upload.push import push
from streamquant.quant.errors import StreamquantError
from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, lost_commit, rate_limit, refuse_token
from tests.publish.hub_client import ANYWAY, GGUF, Heard, expected, published, puts, titles

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# Faults on the way


FAULTS = {
    "a PUT fails": [Fault(method="PUT", status=500, times=8)],
    "a PUT is cut": [Fault(method="PUT", cut_after=1000, times=3)],
    "a PUT is reset": [Fault(method="PUT", reset_after=1000, times=3)],
    "the answer to a commit is lost": [lost_commit()],
    "a commit fails, and its answer is lost": [Fault(path="*/commit/*", status=502), lost_commit()],
    "a commit comes at the same time": [Fault(path="*/commit/*", status=412, message="A commit has happened since")],
    "too many requests": [rate_limit(0), Fault(path="*/tree/*", status=429, headers={"Retry-After": "0"})],
    "the Hub hangs up": [Fault(path="*/api/*", hang_up=True, times=3)],
    "the repository's making is lost": [Fault(path="*/repos/create", status=504, applied=True)],
    "a proxy answers with a page": [Fault(path="*/validate-yaml", status=503, message="<html>", times=2)],
    "verification fails": [Fault(path="*/verify", status=503, times=2)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way(hub: Hub, out: Path, name: str) -> None:
    faults = [hub.arm(dataclasses.replace(fault)) for fault in FAULTS[name]]
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert all(fault.fired for fault in faults)
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")
    assert len(titles(hub, GGUF)) == 1
    assert len(puts(hub)) == 2
    assert hub.leaked_tokens() == []


def test_a_fault_that_stays_is_told_and_the_push_goes_on_later(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "ATTEMPTS", 2)
    heard = Heard()
    hub.arm(Fault(path="*/commit/*", status=503, times=None))
    with pytest.raises(StreamquantError, match="the Hub has a fault"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY, heard)
    assert heard.waits
    assert "503" in heard.waits[0][0]
    assert len(puts(hub)) == 2
    hub.faults.clear()
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert len(puts(hub)) == 2
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


def test_a_token_that_is_refused_midway(hub: Hub, out: Path) -> None:
    hub.arm(dataclasses.replace(refuse_token(), path="*/commit/*"))
    with pytest.raises(StreamquantError, match="the token was refused") as raised:
        push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert WRITE_TOKEN not in str(raised.value)


def test_a_read_only_token(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(StreamquantError, match="the token may not do this") as raised:
        push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert READ_TOKEN not in str(raised.value)


def test_no_token(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StreamquantError, match="no token for the Hub"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert hub.requests == []


def test_offline(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StreamquantError, match="switched off"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)


def test_a_foreign_namespace(hub: Hub, out: Path) -> None:
    with pytest.raises(StreamquantError, match="the token may not do this"):
        push(out / "Tiny-GGUF", "SOMEBODY/Tiny-GGUF", ANYWAY)


def test_a_full_account(hub: Hub, out: Path) -> None:
    hub.arm(Fault(path="*/lfs/objects/batch", status=403, times=None, message="Storage limit reached for ORG"))
    with pytest.raises(StreamquantError, match="storage on the Hub is used up"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)


def test_a_name_that_is_taken(hub: Hub, out: Path) -> None:
    hub.arm(Fault(path="*/repos/create", status=409, times=None, message="the name is taken by a collection"))
    with pytest.raises(StreamquantError, match="the name is taken"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)


def test_a_gitignore_that_hides_files_is_noticed(hub: Hub, out: Path) -> None:
    hub.add_repo(GGUF, {".gitignore": b"*.gguf\n", ".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"})
    with pytest.raises(StreamquantError, match="did not arrive"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)


def test_a_card_that_the_hub_refuses_is_known_before_anything_is_sent(
    hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_module, "refresh_card", lambda *_arguments: False)
    (out / "Tiny-GGUF" / "README.md").write_text("---\nlicense: [unclosed\n---\n# Mine\n")
    with pytest.raises(StreamquantError, match="does not accept the model card"):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert hub.select(method="PUT") == []


def test_a_redirect_to_another_host_gets_no_token(hub: Hub, out: Path) -> None:
    hub.arm(Fault(path="*/repos/create", redirect="stranger", times=None))
    with pytest.raises(StreamquantError):
        push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert hub.select(host="stranger")
    assert hub.leaked_tokens() == []


def test_an_interrupt_ends_an_upload(hub: Hub, tmp_path: Path, interrupt_after: Callable[[float], None]) -> None:
    fault = hub.arm(Fault(method="PUT", trickle=2_000_000, times=None))
    target = Target(connect(), Destination(GGUF))
    target.open(private=False)
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.truncate(100_000_000)  # 50 seconds, and much more than the buffers of a socket swallow at once
    ended: list[BaseException] = []

    def send() -> None:
        try:
            target.send([Outgoing("large.gguf", path, 100_000_000, None)], "x")
        except BaseException as error:
            ended.append(error)
            raise

    before = time.monotonic()
    interrupt_after(1)
    with pytest.raises(KeyboardInterrupt):
        in_background(send, target.stop)
    assert fault.fired
    assert [type(error) for error in ended] == [Stopped]
    assert time.monotonic() - before < 9


def test_a_stop_ends_the_reading_of_a_file(out: Path) -> None:
    """What the buffers of a socket swallow at once is not enough to see it in an upload."""
    path, stop = out / "Tiny-GGUF" / "Tiny-Q8_0.gguf", threading.Event()
    heard = Heard()
    meter = Meter(path.stat().st_size, heard, stop)
    with MeteredFile(path, meter) as file:
        file.read(1000)
        stop.set()
        with pytest.raises(Stopped):
            file.read(1000)
    assert heard.sent == [1000]


def test_another_thread_closes_the_client(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub does so when a connection is refused: one client serves all threads."""
    closed: list[str] = []

    class Shared(client_module._Client):
        def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
            if request.method == "PUT" and len(closed) < 3:
                closed.append(request.url.path)
                close_session()
            return super().send(request, **options)

    monkeypatch.setattr(client_module, "_Client", Shared)
    monkeypatch.setattr(target_module, "THREADS", 1)  # a connection that is made meanwhile would never be closed
    push(out / "Tiny-GGUF", GGUF, ANYWAY)
    assert len(closed) == 3
    assert published(hub, GGUF) == expected(out / "Tiny-GGUF")


def test_progress_counts_every_byte_once(hub: Hub, out: Path) -> None:
    hub.arm(Fault(method="PUT", cut_after=300_000, times=2))
    heard = Heard()
    push(out / "Tiny-GGUF", GGUF, ANYWAY, heard)
    assert min(heard.sent) >= 0
    assert sum(heard.sent) == heard.totals[0] == sum(len(data) for data in expected(out / "Tiny-GGUF").values())
