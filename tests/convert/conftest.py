"""What the tests of convert share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.harness import write_model
from tests.hub import Hub
from tests.hub_source import use


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub in this process, which the client talks to without a token."""
    with Hub() as hub:
        use(hub, tmp_path / "home", monkeypatch)
        yield hub


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in three shards, never changed."""
    return write_model(tmp_path_factory.mktemp("model") / "Tiny", shards=3)
