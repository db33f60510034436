"""The Hub and the client that the tests of the Hub use."""

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import _http
from huggingface_hub.utils._http import close_session
from huggingface_hub.utils.tqdm import disable_progress_bars

from tests.hub import WRITE_TOKEN, Hub
from tests.hub.client import keep_client

# The client hands open files to httpx in a way that httpx has deprecated.
UPLOADS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def noise(size: int, seed: int = 0) -> bytes:
    """Random bytes, the same in every run."""
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="session", autouse=True)
def connections() -> Iterator[None]:
    """The connections of the client, one pool for all tests."""
    disable_progress_bars()
    yield
    close_session()


@pytest.fixture(autouse=True)
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client in process: no token of the user, a cache of its own, uploads by LFS."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    keep_client(monkeypatch)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client wants to wait before it tries again; it does not."""
    seconds: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub in this process."""
    with Hub() as hub:
        yield hub


@pytest.fixture
def api(hub: Hub) -> HfApi:
    """The client of somebody who may write to ORG."""
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.fixture
def anonymous(hub: Hub) -> HfApi:
    """The client of somebody without a token."""
    return HfApi(endpoint=hub.endpoint, token=False)
