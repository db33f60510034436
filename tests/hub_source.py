"""What the tests of the Hub as a source share: the client pointed at a test Hub, here and in forked commands."""

import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convert.hub.spool import GIB
from tests.hub import Commit, Hub, Repo, Request

REPO = "ORG/Tiny"
SHARD = "*.safetensors"


def settings(hub: Hub, home: Path) -> dict[str, Any]:
    """Module attributes that make the client of a process talk to a Hub alone, with its caches below `home`."""
    return {
        "huggingface_hub.constants.ENDPOINT": hub.endpoint,
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint
        + "/{repo_id}/resolve/{revision}/{filename}",
        "huggingface_hub.constants.HF_HUB_CACHE": str(home / "hub"),
        "huggingface_hub.constants.HF_TOKEN_PATH": str(home / "token"),
        "huggingface_hub.constants.HF_HUB_DISABLE_XET": hub.xet is None,
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE": 10 << 20,  # the client's own, which open_repo changes
        "convert.hub.errors.FIRST_WAIT": 0.003,
    }


def environment(home: Path) -> dict[str, str]:
    """Variables of such a process. The quantization_configs that the user's cache holds are taken over: asking
    compressed-tensors for them takes seconds."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamquant"
    place = home / "cache" / "streamquant"
    place.mkdir(parents=True, exist_ok=True)
    for path in own.glob("quantization_config-*.json"):
        shutil.copy(path, place)
    return {"XDG_CACHE_HOME": str(home / "cache"), "NO_PROXY": "127.0.0.1,127.0.0.2,127.0.0.3"}


def faults(hub: Hub, home: Path, **more: Any) -> dict[str, Any]:
    """The same for a command of tests.attacks.zygote; `more` are module attributes with `_` for `.`."""
    return {"set": settings(hub, home) | more, "environ": environment(home)}


def use(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> None:
    """The same for this process; the client does not sleep between its own attempts."""
    for name, value in settings(hub, home).items():
        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, value)
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(importlib.import_module(module), "time", SimpleNamespace(sleep=lambda _seconds: None))


def commit_of(repo: Repo, revision: str = "main") -> Commit:
    """What a revision stands for now."""
    commit = repo.resolve(revision)
    assert commit is not None
    return commit


def gib_of(folder: Path, shards: int) -> float:
    """--spool-gib for so many of the largest shard of a folder, and not a byte more than that needs."""
    largest = max(path.stat().st_size for path in folder.glob(SHARD))
    return (shards * largest + 1) / GIB


def fetched(requests: Iterable[Request]) -> Counter[str]:
    """How often each shard was asked for as a whole: not by a range, which planning reads headers by."""
    return Counter(
        request.file
        for request in requests
        if request.file is not None
        and request.file.endswith(".safetensors")
        and request.method == "GET"
        and request.host == "cdn"
        and request.range is None
    )


def without_origin(out: Path) -> dict[str, Any]:
    """The manifests of an --out folder by path, without what says where the source came from: repository, commit, and
    the fingerprints, which hold the times of local files and the hashes of those of the Hub."""
    found = {}
    for path in sorted(out.rglob("streamquant.json")):
        manifest = json.loads(path.read_text())
        manifest["source"] = {k: v for k, v in manifest["source"].items() if k not in ("repo", "revision")}
        for variant in manifest["variants"].values():
            del variant["fingerprint"]
        found[str(path.relative_to(out))] = manifest
    return found
