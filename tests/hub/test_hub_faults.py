"""Each fault as a reader sees it through the unmodified client. (Faults of uploads: test_hub_writing.py.)"""

import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils._http import http_backoff

from streamquant.hub.http_library import httpx
from tests.hub import WRITE_TOKEN, Fault, Hub, move_main, rate_limit, refuse_token
from tests.hub.conftest import noise
from tests.hub.faults import NO_FAULT, Faults, parse_fault

WEIGHTS = noise(400_000)
PIECE = 100_000


@pytest.fixture(autouse=True)
def repo(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repo of one LFS file, read by the client in pieces of 100 kB instead of 10 MB."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
    hub.add_repo("ORG/M", {"config.json": b"{}", "model.safetensors": WEIGHTS})


def download(hub: Hub, name: str = "model.safetensors") -> bytes:
    return Path(hf_hub_download("ORG/M", name, endpoint=hub.endpoint, token=WRITE_TOKEN)).read_bytes()


def ranges(hub: Hub) -> list[str | None]:
    return [request.range for request in hub.select(host="cdn")]


# The body of a file


@pytest.mark.parametrize("fault", [Fault(cut_after=250_000), Fault(short_by=150_000)])
def test_a_cut_is_resumed_at_the_last_piece(hub: Hub, waits: list[float], fault: Fault) -> None:
    fault.host = "cdn"
    hub.arm(fault)
    assert download(hub) == WEIGHTS
    assert ranges(hub) == [None, "bytes=200000-"]
    assert [request.sent for request in hub.select(host="cdn")] == [250_000, 200_000]
    assert [request.fault for request in hub.select(host="cdn")] == [True, False]
    assert waits == [1]


def test_a_reset_is_not_resumed_by_the_client(hub: Hub) -> None:
    hub.arm(Fault(host="cdn", reset_after=250_000))
    with pytest.raises(httpx.ReadError):
        download(hub)
    assert download(hub) == WEIGHTS
    assert ranges(hub) == [None, None]


def test_wrong_bytes_go_unseen_by_the_client(hub: Hub) -> None:
    hub.arm(Fault(host="cdn", flip=(0, 123_456, -1)))
    wrong = download(hub)
    assert len(wrong) == len(WEIGHTS)
    assert [i for i, (a, b) in enumerate(zip(wrong, WEIGHTS, strict=True)) if a != b] == [0, 123_456, 399_999]
    assert hub.repo("ORG/M").files()["model.safetensors"] == WEIGHTS


def test_a_body_that_is_short_and_says_so(hub: Hub) -> None:
    hub.arm(Fault(host="cdn", shrink_by=1))
    with pytest.raises(OSError, match="Consistency check failed: file should be of size 400000 but has size 399999"):
        download(hub)


def test_a_trickle(hub: Hub) -> None:
    hub.arm(Fault(host="cdn", trickle=2_000_000))
    start = time.monotonic()
    assert download(hub) == WEIGHTS
    assert 0.2 <= time.monotonic() - start < 2


def test_a_file_on_disk_is_cut_to_the_byte(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "model.safetensors").write_bytes(WEIGHTS)
    hub.add_repo("ORG/M", tmp_path / "M")
    hub.arm(Fault(host="cdn", cut_after=250_001))
    hub.arm(Fault(host="cdn", flip=(3,)))
    wrong = download(hub)
    assert (wrong[:200_003], wrong[200_004:]) == (WEIGHTS[:200_003], WEIGHTS[200_004:])
    assert wrong[200_003] == WEIGHTS[200_003] ^ 1
    assert hub.sent_by_file() == {"model.safetensors": 250_001 + 200_000}
    url = hf_hub_url("ORG/M", "model.safetensors", endpoint=hub.endpoint)
    assert get_session().get(url, headers={"Range": "bytes=5-99"}).content == WEIGHTS[5:100]


# Instead of an answer


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_of_the_server(hub: Hub, waits: list[float], status: int) -> None:
    hub.arm(Fault(method="GET", host="cdn", status=status))
    with pytest.raises(HfHubHTTPError, match=str(status)):  # the client tries the content of a file once
        download(hub)
    fault = hub.arm(Fault(method="HEAD", status=status, times=2))
    assert download(hub) == WEIGHTS
    assert (fault.fired, waits) == (2, [1])
    hub.arm(Fault(path="/api/*", status=status))
    with pytest.raises(HfHubHTTPError, match=str(status)):
        HfApi(endpoint=hub.endpoint).model_info("ORG/M")


@pytest.mark.parametrize("policy", [True, False])
def test_a_rate_limit_is_waited_for(hub: Hub, waits: list[float], policy: bool) -> None:
    hub.arm(rate_limit(7, policy=policy, host="cdn"))
    assert download(hub) == WEIGHTS
    assert waits == [8]


def test_a_rate_limit_that_lasts(hub: Hub, waits: list[float]) -> None:
    hub.arm(rate_limit(55, path="/api/*", times=None))
    with pytest.raises(HfHubHTTPError, match="you have reached your 'api' rate limit"):
        http_backoff("GET", f"{hub.endpoint}/api/models/ORG/M")
    assert waits == [56] * 5


def test_a_token_refused_in_the_middle(hub: Hub, tmp_path: Path) -> None:
    hub.arm(refuse_token(path="*/resolve/*", skip=1, times=None))
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        snapshot_download("ORG/M", endpoint=hub.endpoint, token=WRITE_TOKEN, max_workers=1)
    assert caught.value.response.status_code == 401


def test_a_connection_closed_without_an_answer(hub: Hub, waits: list[float]) -> None:
    hub.arm(Fault(host="cdn", hang_up=True))
    assert download(hub) == WEIGHTS
    hub.arm(Fault(path="/api/*", hang_up=True))
    with pytest.raises(httpx.RemoteProtocolError):
        HfApi(endpoint=hub.endpoint).model_info("ORG/M")
    assert [request.status for request in hub.select(path="/api/*")] == [None]


def test_an_answer_that_comes_too_late(hub: Hub) -> None:
    hub.arm(Fault(method="HEAD", delay=0.3))
    path = hf_hub_download("ORG/M", "config.json", endpoint=hub.endpoint, etag_timeout=0.1)
    assert Path(path).read_bytes() == b"{}"
    assert len(hub.select(method="HEAD")) == 2  # a file that is not in the cache is asked for twice
    hub.arm(Fault(path="/api/*", delay=0.3))
    with pytest.raises(httpx.ReadTimeout):
        HfApi(endpoint=hub.endpoint).model_info("ORG/M", timeout=0.1)


# What moves


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_main_moves_between_requests(hub: Hub, skip: int) -> None:
    old = hub.repo("ORG/M").branches["main"]
    hub.arm(move_main("ORG/M", {"config.json": "new"}, skip=skip))
    folder = Path(snapshot_download("ORG/M", endpoint=hub.endpoint, max_workers=1))
    new = hub.repo("ORG/M").branches["main"]
    assert new != old
    assert folder.name == (new if skip == 0 else old)
    assert (folder / "config.json").read_bytes() == (b"new" if skip == 0 else b"{}")


def test_a_redirect_to_a_stranger(hub: Hub) -> None:
    hub.arm(Fault(path="*/resolve/*", redirect="stranger", times=None))
    with pytest.raises(LocalEntryNotFoundError):  # the client does not follow it with HEAD
        download(hub, "config.json")
    answer = get_session().get(
        hf_hub_url("ORG/M", "config.json", endpoint=hub.endpoint), headers={"Authorization": f"Bearer {WRITE_TOKEN}"}
    )
    assert answer.content == b"from a stranger"
    assert len(hub.select(host="stranger")) == 1
    assert hub.leaked_tokens() == []
    get_session().get(hub.urls["stranger"], headers={"Authorization": f"Bearer {WRITE_TOKEN}"})
    assert [request.token for request in hub.leaked_tokens()] == [WRITE_TOKEN]


# Which requests


def test_which_requests_a_fault_waits_for() -> None:
    faults = Faults()
    first = faults.arm(Fault(method="GET|PUT", path="*/a*", host="cdn", skip=1, times=2))
    second = faults.arm(Fault(times=None))
    got = [
        faults.take(host, method, path)
        for host, method, path in [
            ("cdn", "GET", "/x/a"),  # skipped by the first
            ("cdn", "GET", "/x/b"),
            ("hub", "GET", "/x/a"),
            ("cdn", "HEAD", "/x/a"),
            ("cdn", "PUT", "/x/abc"),
            ("cdn", "GET", "/x/a"),
            ("cdn", "GET", "/x/a"),  # the first is exhausted
        ]
    ]
    assert [fault is first for fault in got] == [False, False, False, False, True, True, False]
    assert (first.fired, second.fired) == (2, 5)
    faults.clear()
    assert faults.take("cdn", "GET", "/x/a") is NO_FAULT


def test_a_fault_with_a_probability() -> None:
    faults = Faults(seed=1)
    fault = faults.arm(Fault(probability=0.3, times=None))
    for _ in range(1000):
        faults.take("hub", "GET", "/")
    assert 250 < fault.fired < 350


def test_faults_from_json() -> None:
    assert parse_fault({"path": "*.gguf", "flip": [1, -1]}) == Fault(path="*.gguf", flip=(1, -1))
    with pytest.raises(ValueError, match="no such property of a fault: cut_afer"):
        parse_fault({"cut_afer": 1})
