"""What all tests share: test data, the reference programs, a real model, and its conversions; made once in a run.

What takes seconds to make is kept on a shelf, a folder that the workers of pytest-xdist share: the first that needs a
thing makes it under a lock, the others take it.
"""

import fcntl
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from convert.checkpoint import open_checkpoint
from convert.conversion import convert
from convert.recipe import RECIPES, parse_variants
from examples.smollm2_checkpoint import FOLDER, write_smollm2
from tests import gguf_peer

REPOSITORY = Path(__file__).resolve().parents[1]
SMOLLM2_PACKAGE = Path(os.environ.get("STREAMQUANT_SMOLLM2", REPOSITORY / ".cache" / "smollm2" / "package"))


@dataclass(frozen=True, slots=True)
class Shelf:
    """A folder of things that take long to make."""

    folder: Path

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `make(folder)` if no test of this run did so before. Must not be written to."""
        place = self.folder / re.sub(r"[^\w.-]", "_", name)
        with (self.folder / f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.folder / f"{place.name}.done"
            if not done.exists():
                place.mkdir(exist_ok=True)
                make(place)
                done.touch()
        return place


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The shelf of this test run, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shelf"
    folder.mkdir(exist_ok=True)
    return Shelf(folder)


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared test data."""
    folder = gguf_peer.data_folder()
    if folder is None:
        pytest.skip("no shared test data: set STREAMQUANT_DATA, or put it beside the repository, ../shared/data")
    return folder


@pytest.fixture(scope="session")
def peers() -> Path:
    """The folder of the reference programs that are installed outside the environment."""
    folder = gguf_peer.converter_folder()
    if folder is None:
        pytest.skip("llama.cpp's converter is not installed: make setup, or set STREAMQUANT_PEERS")
    return folder.parent


@pytest.fixture(scope="session")
def smollm2(shelf: Shelf) -> Path:
    """SmolLM2-135M-Instruct as a sharded BF16 checkpoint."""
    if not any(SMOLLM2_PACKAGE.rglob("*.gguf")):
        pytest.skip(f"no SmolLM2 at {SMOLLM2_PACKAGE}: make setup, or set STREAMQUANT_SMOLLM2 to where it is unpacked")
    return shelf.get("smollm2-source", lambda folder: write_smollm2(SMOLLM2_PACKAGE, folder / FOLDER)) / FOLDER


@pytest.fixture(scope="session")
def smollm2_variants(shelf: Shelf, smollm2: Path) -> Path:
    """The --out folder of one conversion of SmolLM2 into every variant there is."""
    return shelf.get(
        "smollm2-variants",
        lambda folder: convert(open_checkpoint(smollm2), parse_variants(list(RECIPES)), folder, jobs=2),
    )
