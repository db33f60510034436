"""What the tests of the Hub as a source share: the client pointed at a test Hub, here and in forked commands."""

import importlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.view import plan_json
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.spool import GIB
from tests.attacks.harness import TO, Ran, run, write_model
from tests.hub import Commit, Hub, Repo, Request
from tests.hub.client import keep_client

REPO = "ORG/Tiny"
SHARD = "*.safetensors"
FIVE = ("--to", "fp8-dynamic", "--to", "gguf:Q8_0,Q6_K,Q4_K_M,Q4_0")
SHARDS = 8
SECONDS = 20
"""How long a test waits for what should happen at once."""


def write_in_shards(folder: Path) -> Path:
    """A model of 16 MB in SHARDS shards, with matrices that K-quants take."""
    size = {
        "hidden_size": 512,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    return write_model(folder, size=size, vocab_size=2048, shards=SHARDS)


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
        "streamquant.hub.errors.FIRST_WAIT": 0.003,
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
    keep_client(monkeypatch)
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


def files(model: Path, **changes: bytes | None) -> dict[str, bytes]:
    """The files of a folder by name, some changed: `__` stands for `.`; None removes one."""
    content = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    for name, data in changes.items():
        content.pop(name.replace("__", "."), None)
        if data is not None:
            content[name.replace("__", ".")] = data
    return content


def plan(spec: str, *more: object) -> Ran:
    """`streamquant plan`."""
    return run("plan", spec, *TO, *more)


def plan_of(checkpoint: Any) -> dict[str, Any]:
    """A plan as JSON, without what differs between a folder and the Hub."""
    recipes = parse_variants(["fp8-dynamic", "gguf:BF16,Q8_0,Q4_0"])
    found = plan_json(make_plan(checkpoint, recipes), 1)
    for name in ("repo", "revision", "commit"):
        found["source"].pop(name, None)
    return {key: value for key, value in found.items() if key not in ("fingerprint", "disk_bytes", "spool_bytes")}


class Later:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call(*self._arguments)
        except BaseException as error:  # looked at by the test
            self.error = error

    def wait(self) -> Any:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result
