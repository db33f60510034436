"""What is refused of a Hub: every error on the way, the client's cache and offline mode, a hostile Hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import MAX_CONFIG, open_checkpoint
from streamquant.convert.source.hub_checkpoint import open_hub_checkpoint, side_folder
from streamquant.convert.source.open import open_source
from streamquant.hub.repo import open_repo
from streamquant.quant.errors import StreamquantError
from tests.attacks.harness import TO, pack, run
from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, SparseFile, refuse_token
from tests.hub.protocol import json_answer
from tests.hub_source import REPO, files, gib_of, plan, plan_of

INDEX = "model.safetensors.index.json"


# Errors

Prepare = Callable[[Hub, Path, pytest.MonkeyPatch], None]


def _gated(hub: Hub, model: Path, _: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model, gated="manual")


def _gated_with_token(hub: Hub, model: Path, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model, gated="manual", granted=("alice",))
    patch.setenv("HF_TOKEN", READ_TOKEN)


def _private(hub: Hub, model: Path, _: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model, private=True)


def _private_of_others(hub: Hub, model: Path, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model, private=True)
    patch.setenv("HF_TOKEN", READ_TOKEN)


def _refused_token(hub: Hub, model: Path, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model)
    patch.setenv("HF_TOKEN", "hf_nobody_knows_this_one")


def _revoked_meanwhile(hub: Hub, model: Path, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model)
    patch.setenv("HF_TOKEN", READ_TOKEN)
    hub.arm(refuse_token(path="*/resolve/*", times=None))


def _nothing(*_: object) -> None:
    pass


def _without(*names: str) -> Prepare:
    return lambda hub, model, _: _add(hub, {k: v for k, v in files(model).items() if k not in names})


def _only(**content: bytes) -> Prepare:
    return lambda hub, model, _: _add(
        hub,
        {k: v for k, v in files(model).items() if not k.endswith((".safetensors", "index.json"))}
        | {name.replace("__", "."): data for name, data in content.items()},
    )


def _add(hub: Hub, content: dict[str, bytes]) -> None:
    hub.add_repo(REPO, content)


def _index(change: Callable[[dict[str, str]], None]) -> Prepare:
    def prepare(hub: Hub, model: Path, _: pytest.MonkeyPatch) -> None:
        content = files(model)
        index = json.loads(content[INDEX])
        change(index["weight_map"])
        _add(hub, content | {INDEX: json.dumps(index).encode()})

    return prepare


def _shard(data: bytes) -> Prepare:
    return _only(model__safetensors=data)


def _faulty(**fault: Any) -> Prepare:
    def prepare(hub: Hub, model: Path, _: pytest.MonkeyPatch) -> None:
        hub.add_repo(REPO, model)
        hub.arm(Fault(times=None, **fault))

    return prepare


LIE = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [8, 8], "data_offsets": [0, 128]}}
ERRORS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "gated": (_gated, ("the repository is gated", "ask for access on ", f"/{REPO}, then run `hf auth login`")),
    "gated, with a token": (_gated_with_token, ("the repository is gated", "required: a token of an account")),
    "private": (
        _private,
        ("repository not found, or private", "check the name; if it is private, run `hf auth"),
    ),
    "private, of others": (_private_of_others, ("repository not found, or private", "must be of an account that may")),
    "missing": (_nothing, ("repository not found, or private", REPO)),
    "refused token": (_refused_token, ("the token was refused", "to do:    make a new token", "HF_TOKEN")),
    "token revoked meanwhile": (_revoked_meanwhile, ("the token was refused", "fetching ")),
    "no config.json": (_without("config.json"), ("not a Hugging Face checkpoint", "found:    no config.json")),
    "only .bin": (
        _only(pytorch_model__bin=b"pickle"),
        ("no weights to convert", "found:    pytorch_model.bin", "required: model.safetensors or", "to do:"),
    ),
    "only gguf": (
        _only(Tiny__gguf=b"GGUF"),
        ("no weights to convert", "found:    Tiny.gguf", "unquantized"),
    ),
    "no weights": (_only(), ("no weights to convert", "found:    no safetensors")),
    "index leads outside": (
        _index(lambda names: names.update({next(iter(names)): "../../etc/x.safetensors"})),
        ("index names a file outside the checkpoint's folder", "'../../etc/x.safetensors'"),
    ),
    "index names an absolute path": (
        _index(lambda names: names.update({next(iter(names)): "/etc/x.safetensors"})),
        ("index names a file outside the checkpoint's folder",),
    ),
    "index names a missing shard": (
        _index(lambda names: names.update({next(iter(names)): "model-00009-of-00003.safetensors"})),
        ("missing shard", f"{REPO}@", "/model-00009-of-00003.safetensors", "1 of 4 shards"),
    ),
    "shard shorter than its header says": (_shard(pack(LIE, bytes(64))), (f"{REPO}@", "model.safetensors")),
    "shard longer than its header says": (_shard(pack(LIE, bytes(256))), (f"{REPO}@", "model.safetensors")),
    "header longer than the file": (_shard(pack(LIE, length=4000)), ("model.safetensors",)),
    "header too long": (_shard(pack(LIE, bytes(128), length=1 << 40)), ("safetensors header too large",)),
    "header is no JSON": (_shard(pack(b"[" * 100_000)), ("model.safetensors, header",)),
    "header of nothing": (_shard(b""), ("not a safetensors file",)),
    "listing fails": (_faulty(path="/api/*", status=503), ("the Hub has a fault", "listing the files", "503")),
    "Hub is limited": (
        _faulty(path="/api/*", status=429, headers={"Retry-After": "100000"}),
        ("the Hub limits how often it is asked", "wait some minutes"),
    ),
    "hangs up": (_faulty(hang_up=True), ("the Hub cannot be reached", "check the network, proxy and HF_ENDPOINT")),
    "header always short": (
        _faulty(host="cdn", path="*.safetensors", shrink_by=100),
        ("what arrived is not what the Hub holds", "reading the beginning of model-0000"),
    ),
    "side file always wrong": (
        _faulty(path="*/tokenizer.json", flip=(3,)),
        ("what arrived is not what the Hub holds", "fetching tokenizer.json"),
    ),
    "a redirect to ftp": (
        _faulty(path="/api/*", redirect="ftp://127.0.0.1"),
        ("the Hub refers to an address that cannot be fetched", "ftp://", "listing the files"),
    ),
    "a redirect to a file": (
        _faulty(path="/api/*", redirect="file:///etc"),
        ("the Hub refers to an address that cannot be fetched", "file://", "listing the files"),
    ),
    "not JSON": (_faulty(path="/api/*", redirect="stranger"), ("the Hub has a fault", "an answer that is not JSON")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One message of what is wrong and what to do, exit code 1, no token, and nothing is written."""
    prepare, words = ERRORS[case]
    prepare(hub, model, monkeypatch)
    ran = plan(REPO)
    ran.without_waits().refused(1, *words)
    assert "hf_" not in ran.err.replace("HF_", ""), ran.err
    assert not hub.leaked_tokens()
    ran = run("convert", REPO, *TO, "--out", tmp_path / "out")
    ran.without_waits().refused(1, words[0])
    assert not (tmp_path / "out").exists()


def test_bad_revision(model: Path, hub: Hub) -> None:
    hub.add_repo(REPO, model)
    plan(f"{REPO}@nowhere").refused(1, "no such revision", f"{REPO}@nowhere", "required: a branch, a tag or a commit")


def test_unreachable_endpoint(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again with longer waits, then said."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.9:9")
    waits: list[float] = []
    monkeypatch.setattr("streamquant.hub.errors.time.sleep", waits.append)
    ran = plan(REPO)
    words = ("the Hub cannot be reached", "http://127.0.0.9:9", "check the network, proxy and HF_ENDPOINT")
    ran.without_waits().refused(1, *words)
    assert len(waits) == 7 == ran.err.count("; again in ")


def test_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "hub.invalid")
    plan(REPO).refused(2, "not an address of a Hub", "HF_ENDPOINT", "hub.invalid", "required: https://host")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500, times=3),
        Fault(status=429, headers={"Retry-After": "0"}, times=2),
        Fault(hang_up=True, times=2),
        Fault(host="cdn", path="*.safetensors", cut_after=100, times=2),
        Fault(host="cdn", path="*.safetensors", reset_after=100, times=2),
        Fault(host="cdn", path="*.safetensors", shrink_by=10, times=2),
        Fault(host="cdn", path="*.safetensors", short_by=10, times=2),
        Fault(path="*/tokenizer.json", flip=(100,), times=2),
        Fault(path="/api/*", redirect="stranger"),
    ],
    ids=lambda fault: f"{fault.status or ''}{fault.path}",
)
def test_faults_while_planning(fault: Fault, model: Path, hub: Hub) -> None:
    hub.add_repo(REPO, model)
    hub.arm(fault)
    assert plan_of(open_source(REPO)) == plan_of(open_checkpoint(model))
    assert fault.fired == fault.times


# Options of a command


def test_spool_smaller_than_a_shard(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo(REPO, model)
    largest = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size).name
    words = ("the spool is smaller than a shard", "--spool-gib", f"for {largest}", "twice that")
    small = gib_of(model, 1) / 2
    plan(REPO, "--spool-gib", small).refused(2, *words)
    run("convert", REPO, *TO, "--out", tmp_path / "out", "--spool-gib", small).refused(2, *words)
    assert not (tmp_path / "out" / "Tiny-GGUF").exists()
    plan(REPO, "--spool-gib", gib_of(model, 1)).done()


def test_disk_too_small(model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spool counts."""
    hub.add_repo(REPO, model)
    found = json.loads(plan(REPO, "--json").done().out)
    needed = found["disk_bytes"] + 64 * 2**20
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(
        "streamquant.convert.conversion.shutil.disk_usage", lambda _path: usage._replace(free=needed - 1)
    )
    for command in (("plan", REPO, *TO), ("convert", REPO, *TO)):
        run(*command, "--out", tmp_path / "out").refused(1, "not enough disk space", f"required: {needed:,} bytes")
    assert not list((tmp_path / "out").rglob("*.gguf*"))
    monkeypatch.setattr("streamquant.convert.conversion.shutil.disk_usage", lambda _path: usage._replace(free=needed))
    run("convert", REPO, *TO, "--out", tmp_path / "out").done()


# The client's cache, and its offline mode


def test_offline_without_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plan(REPO).refused(1, "not in the local cache, and the Hub is switched off", "HF_HUB_OFFLINE=1", "hf download")
    assert not hub.requests


def test_offline_with_the_cache(model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole conversion without a request; the same plan as online, by its fingerprint too."""
    hub.add_repo(REPO, model)
    online = make_plan(open_source(REPO), parse_variants(["gguf:Q8_0"])).fingerprint
    shutil.rmtree(side_folder(open_repo(REPO)))
    snapshot_download(REPO)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert make_plan(open_source(REPO), parse_variants(["gguf:Q8_0"])).fingerprint == online
    run("convert", REPO, *TO, "--out", tmp_path / "out").done()
    run("verify", tmp_path / "out", "--source", model).done()
    assert not hub.requests


def test_offline_with_half_of_the_cache(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model)
    snapshot_download(REPO, ignore_patterns=["*00002*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plan(REPO).refused(1, "missing shard", "model-00002-of-00003.safetensors", "as far as it is in the local cache")


# What a hostile Hub could say


def test_hostile_side_files(model: Path, hub: Hub, tmp_path: Path) -> None:
    """Names that lead elsewhere are not side files: never fetched, never written."""
    hostile = ["a/../../x.json", "../x.json", "/etc/x.json", "..\\x.json", "a\\..\\x.json", "C:x\x00.json", "x\n.json"]
    hostile += ["additional_chat_templates/../x.jinja", "additional_chat_templates/a/../../x.jinja", ".hidden.json"]
    hostile += ["additional_chat_templates/..", "./x.json", "deep/er/x.json"]
    content = files(model) | dict.fromkeys(hostile, b"{}")
    content["additional_chat_templates/fine.jinja"] = b"{{ 1 }}"
    _add(hub, content)
    checkpoint = open_source(REPO)
    assert not set(checkpoint.side_files) & set(hostile)
    assert "additional_chat_templates/fine.jinja" in checkpoint.side_files
    run("convert", REPO, "--to", "fp8-dynamic", "--out", tmp_path / "out").done()
    assert not {request.file for request in hub.requests} & set(hostile)
    written = {path.name for path in tmp_path.rglob("*")}
    assert not written & {"x.json", "x.jinja", ".hidden.json", "C:x\x00.json", "x\n.json"}
    assert not {name for name in written if "\\" in name}
    assert (tmp_path / "out" / "Tiny-FP8-dynamic" / "additional_chat_templates" / "fine.jinja").is_file()


class _Siblings:
    """Changes what the Hub lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
        def answer(value: Any, **more: Any) -> Any:
            if isinstance(value, dict) and "siblings" in value:
                change(value)
            return json_answer(value, **more)

        monkeypatch.setattr("tests.hub.reading.json_answer", answer)


def _set_sibling(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda info: info["siblings"][0].update(values)


LISTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "duplicate": (lambda info: info["siblings"].append(info["siblings"][0]), "the Hub's list of files is broken"),
    "negative size": (_set_sibling(size=-1, lfs=None), "the Hub's list of files is broken"),
    "size is text": (_set_sibling(size="12"), "the Hub's list of files is broken"),
    "size is true": (_set_sibling(size=True), "the Hub's list of files is broken"),
    "no size": (_set_sibling(size=None), "the Hub's list of files is broken"),
    "name is a number": (_set_sibling(rfilename=7), "the Hub's list of files is broken"),
    "name is a list": (_set_sibling(rfilename=["x"]), "the Hub's list of files is broken"),
    "no siblings": (lambda info: info.update(siblings=None), "not a Hugging Face checkpoint"),
    "siblings are text": (lambda info: info.update(siblings="text"), "the Hub's client failed"),
    "no commit": (lambda info: info.update(sha=None), "the Hub names no commit"),
    "commit is a path": (lambda info: info.update(sha="../../../../tmp/x"), "the Hub names no commit"),
    "commit is a number": (lambda info: info.update(sha=7), "the Hub names no commit"),
    "id is a path": (lambda info: info.update(id="../../x"), "a name that cannot be one"),
    "id has no owner": (lambda info: info.update(id="x"), "a name that cannot be one"),
    "id is a number": (lambda info: info.update(id=7), "a name that cannot be one"),
    "id has a revision": (lambda info: info.update(id=f"{REPO}@x"), "a name that cannot be one"),
}


@pytest.mark.parametrize("case", LISTS)
def test_hostile_lists(case: str, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = LISTS[case]
    hub.add_repo(REPO, model)
    _Siblings(monkeypatch, change)
    plan(REPO).refused(1, words)


def test_huge_config_is_not_fetched(model: Path, hub: Hub) -> None:
    """100 MB of config.json: refused by its size in the list."""
    content: dict[str, Any] = files(model) | {"config.json": SparseFile(b"{", 100_000_000)}
    hub.add_repo(REPO, content)
    plan(REPO).refused(1, "JSON file too large", f"{REPO}@", "/config.json", "100,000,000 bytes", str(MAX_CONFIG))
    content = files(model) | {INDEX: SparseFile(b"{", 100_000_000)}
    hub.add_repo("ORG/Index", content)
    plan("ORG/Index").refused(1, "JSON file too large", f"/{INDEX}")
    assert sum(request.sent for request in hub.requests) < 100_000


def test_huge_header_is_not_fetched(model: Path, hub: Hub) -> None:
    """A header that says 5 MB and is 5 MB of spaces is read; one that says 9 MB is not."""
    header = json.dumps(LIE).encode()
    content: dict[str, Any] = {k: v for k, v in files(model).items() if not k.endswith(("index.json", ".safetensors"))}
    content["model.safetensors"] = SparseFile(pack(header, length=9 << 20), 20 << 20)
    hub.add_repo(REPO, content)
    plan(REPO).refused(1, "safetensors header too large")
    assert sum(request.sent for request in hub.requests) < 200_000


@pytest.mark.parametrize(
    ("method", "words"),
    [("*", ("what answers is not a Hub", "127.0.0.1")), ("GET", ("what arrived is not what the Hub holds",))],
    ids=["HEAD too", "GET"],
)
def test_resolve_that_leads_to_another_host(
    method: str, words: tuple[str, ...], model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of resolve answers with a redirect elsewhere: the token does not go along, the content is refused."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.add_repo(REPO, files(model), private=True)
    hub.arm(Fault(method=method, path="*/resolve/*", redirect="stranger", times=None))
    ran = run("convert", REPO, *TO, "--out", tmp_path / "out")
    ran.without_waits().refused(1, *words, "fetching ")
    assert (method == "*") == (not hub.select(host="stranger"))  # the client does not follow a HEAD elsewhere
    assert not hub.leaked_tokens()
    assert WRITE_TOKEN not in ran.err


def test_header_that_comes_from_another_host(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.add_repo(REPO, model, private=True)
    hub.arm(Fault(path="*/resolve/*.safetensors", redirect="stranger", times=None))
    plan(REPO).without_waits().refused(1, "model-0000")
    assert hub.select(host="stranger")
    assert not hub.leaked_tokens()


def test_signed_address_is_in_no_message(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signed URL is as good as a token."""
    hub.add_repo(REPO, model)
    hub.arm(Fault(host="cdn", status=403, times=None))
    ran = plan(REPO)
    ran.without_waits().refused(1, "reading the beginning of ")
    assert "Signature" not in ran.err


def test_open_hub_checkpoint_without_a_cache_folder(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    with pytest.raises(StreamquantError, match=r"(?s)cannot write to the cache.*to do: +set XDG_CACHE_HOME"):
        open_hub_checkpoint(open_repo(REPO))
