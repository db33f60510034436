"""The Hub's client in process, set up for a Hub on loopback, and variant folders that are small."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.listener import Listener, Unit
from streamquant.hub import client, errors
from streamquant.publish.results import VariantFolder
from streamquant.publish.upload import push
from streamquant.publish.upload.options import PushOptions
from tests.conftest import TINY_PRE, Shelf
from tests.hub import WRITE_TOKEN, Hub
from tests.hub.client import client_put_back, keep_client

ANYWAY = PushOptions(without_report=True)
GGUF = "ORG/Tiny-GGUF"
FP8 = "ORG/Tiny-FP8-dynamic"
SECONDS = 20
"""How long an upload may take to notice that its Hub is gone."""
SPECS = ("fp8-dynamic", "gguf:Q8_0,Q4_0")


class Heard(Listener):
    """Keeps what a push tells."""

    def __init__(self) -> None:
        self.totals: list[int | None] = []
        self.sent: list[int] = []
        self.waits: list[tuple[str, float]] = []

    def started(self, task: str, total: int | None, unit: Unit = "steps") -> None:
        assert (task, unit) == ("uploading", "bytes")
        self.totals.append(total)

    def advanced(self, task: str, amount: int = 1) -> None:
        assert task == "uploading"
        self.sent.append(amount)

    def waiting(self, what: str, seconds: float) -> None:
        self.waits.append((what, seconds))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub in this process that the client talks to as alice, who may write to ORG; waits are short."""
    keep_client(monkeypatch)
    with client_put_back():
        with Hub() as hub:
            monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
            monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
            monkeypatch.setattr(errors, "FIRST_WAIT", 0.01)
            monkeypatch.setattr(client, "wait", lambda _seconds, _stop: None)
            monkeypatch.setattr(push, "refresh_card", _plain_card)
            yield hub
        _end_uploads()  # which the end of their Hub ends, while they do not sleep between attempts


def _end_uploads() -> None:
    """Wait for uploads that a test stopped: they would go on in the tests after it."""
    for thread in threading.enumerate():
        if thread.name.startswith("upload"):
            thread.join(SECONDS)
            assert not thread.is_alive(), "an upload goes on without its Hub"


def _plain_card(folder: VariantFolder, *_more: object) -> bool:
    """In place of a model card, which other tests look at."""
    (folder.path / "README.md").write_text(f"---\nlicense: mit\n---\n# {folder.path.name}\n")
    return True


@pytest.fixture(scope="session")
def small_variants(shelf: Shelf, tiny: Path) -> Path:
    """The --out folder of FP8-dynamic, Q8_0 and Q4_0 of `tiny`. Must not be written to: copy it."""
    options = ConversionOptions(pre=TINY_PRE)
    return shelf.get(
        "publish-variants",
        lambda out: convert(make_plan(open_checkpoint(tiny), parse_variants(SPECS), options), out, RunOptions(jobs=2)),
    )


@pytest.fixture
def out(small_variants: Path, tmp_path: Path) -> Path:
    """A copy of it, with its times."""
    return Path(shutil.copytree(small_variants, tmp_path / "out"))


def without_own_commit(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a repository without the one that the Hub makes itself."""
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def expected(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that convert wrote, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def published(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    files = dict(hub.repo(repo).files(revision))
    del files[".gitattributes"]
    return files


def titles(hub: Hub, repo: str) -> list[str]:
    """Of the commits after the Hub's own first one."""
    return [commit.title for commit in hub.repo(repo).history()][:-1]


def head(hub: Hub, repo: str) -> str:
    return hub.repo(repo).branches["main"]


def puts(hub: Hub) -> list[str]:
    return sorted(request.path for request in hub.select(method="PUT") if request.status == 200)
