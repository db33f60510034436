"""Models and processes that the attacks share; each test gets a copy or reads only."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.harness import Zygote, write_medium_model, write_model


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in one file, never changed."""
    return write_model(tmp_path_factory.mktemp("pristine") / "Tiny")


@pytest.fixture(scope="session")
def pristine_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in three shards, never changed."""
    return write_model(tmp_path_factory.mktemp("pristine") / "Tiny", shards=3)


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A small model in one file, the test's own."""
    return Path(shutil.copytree(pristine, tmp_path / "Tiny"))


@pytest.fixture
def sharded(pristine_sharded: Path, tmp_path: Path) -> Path:
    """A small model in three shards, the test's own."""
    return Path(shutil.copytree(pristine_sharded, tmp_path / "Tiny"))


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB in three shards, never changed."""
    return write_medium_model(tmp_path_factory.mktemp("medium") / "Medium")


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks commands with faults."""
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()
