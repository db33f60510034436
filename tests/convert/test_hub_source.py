"""Planning from the Hub: through the command line and the unmodified client."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.open import open_source
from streamquant.hub.reference import ModelReference, check_name, parse_reference
from streamquant.hub.repo import open_repo
from streamquant.quant.errors import UsageError
from tests.attacks.harness import write_model
from tests.conftest import Shelf
from tests.hub import WRITE_TOKEN, Hub, move_main
from tests.hub.protocol import ranged
from tests.hub_source import REPO, commit_of, files, plan, plan_of
from tests.shapes import SHAPES, files_of, write_shape

INDEX = "model.safetensors.index.json"
DEEP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""A model with a header of more than 8 KiB."""


# Planning


def test_plan_is_that_of_the_folder(model: Path, hub: Hub) -> None:
    repo = hub.add_repo(REPO, model)
    checkpoint = open_source(REPO)
    assert plan_of(checkpoint) == plan_of(open_checkpoint(model))
    assert checkpoint.side_files == open_checkpoint(model).side_files
    assert checkpoint.ignored_files == open_checkpoint(model).ignored_files
    assert isinstance(checkpoint, HubCheckpoint)
    assert checkpoint.hub.commit == commit_of(repo).oid
    found = json.loads(plan(f"{REPO}@main", "--json").done().out)
    assert found["source"]["repo"] == REPO
    assert found["source"]["revision"] == "main"
    assert found["source"]["commit"] == commit_of(repo).oid
    assert found["spool_bytes"] == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert found["disk_bytes"] == found["spool_bytes"] + sum(variant["bytes"] for variant in found["variants"])
    shown = plan(REPO).done().out
    assert f"commit {commit_of(repo).oid}" in " ".join(shown.split())
    assert "for shards on their way" in " ".join(shown.split())


def test_plan_reads_headers_alone_and_each_file_once(model: Path, hub: Hub) -> None:
    hub.add_repo(REPO, model)
    open_source(REPO)
    shards = [request for request in hub.requests if request.path.endswith(".safetensors") and request.host == "cdn"]
    assert {request.range for request in shards} == {"bytes=0-8191"}
    assert sorted({str(request.file) for request in shards}) == sorted(
        path.name for path in model.glob("*.safetensors")
    )
    assert len(shards) == 3
    assert all(request.sent <= 8192 for request in shards)
    hub.log.clear()
    open_source(REPO)  # the small files are there
    assert {request.path for request in hub.requests if not request.path.endswith(".safetensors")} == {
        f"/api/models/{REPO}/revision/main"
    }


def test_long_header_takes_a_second_request(tmp_path: Path, hub: Hub) -> None:
    """More than 8 KiB: the rest comes by its exact range."""
    model = write_model(tmp_path / "Tiny", size=DEEP)
    hub.add_repo(REPO, model)
    assert plan_of(open_source(REPO)) == plan_of(open_checkpoint(model))
    length = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    ranges = [request.range for request in hub.requests if request.host == "cdn"]
    assert ranges == ["bytes=0-8191", f"bytes=8192-{length - 1}"]


def test_range_that_the_server_ignores(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole answer in place of a part of it is cut to what was asked for."""
    model = write_model(tmp_path / "Tiny", size=DEEP)
    hub.add_repo(REPO, model)
    monkeypatch.setattr("tests.hub.reading.ranged", lambda blob, _range, headers: _whole(blob, headers))
    assert plan_of(open_source(REPO)) == plan_of(open_checkpoint(model))


def _whole(blob: Any, headers: dict[str, str]) -> Any:
    return ranged(blob, None, headers)


def test_plan_of_405b_is_quick_and_small(
    data: Path, shelf: Shelf, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """812 GB in 191 shards: the headers come in seconds and megabytes, and the sizes are those of a folder's plan."""
    shape, name = SHAPES["Hermes-4-405B"], "NousResearch/Hermes-4-405B"
    folder = shelf.get("shape-Hermes-4-405B", lambda place: write_shape(shape, place / shape.name, data)) / shape.name
    hub.add_repo(name, files_of(shape, data))
    variants = ["fp8-dynamic", "gguf:Q8_0,Q6_K,Q4_K_M"]
    wall, cpu = time.perf_counter(), time.process_time()
    found = make_plan(open_source(f"{name}@main"), parse_variants(variants))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu  # the Hub's own seconds are in both
    traffic = sum(request.sent for request in hub.requests)
    with capsys.disabled():
        sys.stdout.write(
            f" 405B: {wall:.1f} s ({cpu:.1f} CPU s), {traffic / 1e6:.1f} MB in {len(hub.requests)} requests "
        )
    local = make_plan(open_checkpoint(folder), parse_variants(variants))
    assert [(file.path, file.size) for file in found.files] == [(file.path, file.size) for file in local.files]
    assert len(found.checkpoint.files) == 191
    assert traffic < 20_000_000
    assert cpu < 20
    assert not hub.leaked_tokens()


def test_revisions(model: Path, hub: Hub) -> None:
    """A branch, a tag, a pull request, a commit: each stands for its own commit."""
    repo = hub.add_repo(REPO, model)
    first = commit_of(repo).oid
    repo.tags["v1"] = repo.branches["branch"] = first
    second = repo.add_commit({"NOTICE.txt": b"2"}, revision="branch").oid
    third = repo.add_commit(files(model, NOTICE__txt=b"3"), revision="refs/pr/1").oid
    fourth = repo.add_commit({"NOTICE.txt": b"4"}).oid
    expected = {"main": fourth, "v1": first, "branch": second, "refs/pr/1": third, first: first}
    assert {name: open_repo(REPO, name).commit for name in expected} == expected
    assert "NOTICE.txt" in open_source(f"{REPO}@branch").side_files
    assert "NOTICE.txt" not in open_source(f"{REPO}@v1").side_files


def test_everything_is_read_at_the_one_commit(model: Path, hub: Hub) -> None:
    """main moves after the first answer: the plan is of the commit that it named."""
    repo = hub.add_repo(REPO, model)
    commit = commit_of(repo).oid
    moved = {"config.json": "{}", INDEX: "{}", **{path.name: "{}" for path in model.glob("*.safetensors")}}
    hub.arm(move_main(REPO, moved, path="*/resolve/*"))
    checkpoint = open_source(REPO)
    assert commit_of(repo).oid != commit
    assert isinstance(checkpoint, HubCheckpoint)
    assert checkpoint.hub.commit == commit
    assert plan_of(checkpoint) == plan_of(open_checkpoint(model))


def test_folder_goes_before_the_hub(model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORG/NAME that is a folder here is that folder; nobody is asked."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / REPO)
    assert not isinstance(open_source(REPO), HubCheckpoint)
    assert not hub.requests


@pytest.mark.parametrize(
    "text", ["a", "a/b/c", "./a", "../b", "a/..", "a/b@", "a b/c", "a/b@c d", "/a/b", "a\\b/c", ""]
)
def test_what_is_no_repository(text: str, hub: Hub) -> None:
    assert parse_reference(text) is None
    plan(text or " ").refused(2, "no such model folder")
    assert not hub.requests


HOME = constants.HUGGINGFACE_CO_URL_HOME
FORMS = {
    "ORG/Tiny/": "ORG/Tiny",
    "hf://ORG/Tiny": "ORG/Tiny",
    "hf://models/ORG/Tiny": "ORG/Tiny",
    "hf://ORG/Tiny@v1": "ORG/Tiny@v1",
    "hf.co/ORG/Tiny": "ORG/Tiny",
    "https://hf.co/ORG/Tiny": "ORG/Tiny",
    HOME + "ORG/Tiny": "ORG/Tiny",
    HOME.partition("://")[2] + "ORG/Tiny/": "ORG/Tiny",
    HOME + "ORG/Tiny.git": "ORG/Tiny",
    HOME.replace("://", "://www.") + "ORG/Tiny?library=x#files": "ORG/Tiny",
    HOME.replace("://", "://me:hf_secret@") + "ORG/Tiny": "ORG/Tiny",
    HOME + "ORG/Tiny/tree/main": "ORG/Tiny",
    HOME + "ORG/Tiny/tree/v1": "ORG/Tiny@v1",
    HOME + "ORG/Tiny/tree/refs%2Fpr%2F1": "ORG/Tiny@refs/pr/1",
    HOME + "ORG/Tiny/tree/refs/pr/1": "ORG/Tiny@refs/pr/1",
    HOME + "ORG/Tiny/commit/" + "a" * 40: "ORG/Tiny@" + "a" * 40,
    HOME + "ORG/Tiny/blob/main/config.json": "ORG/Tiny",
    HOME + "ORG/Tiny/resolve/v1/model-00001-of-00003.safetensors?download=true": "ORG/Tiny@v1",
    HOME + "ORG/Tiny@refs/pr/1": "ORG/Tiny@refs/pr/1",
}


@pytest.mark.parametrize("text", FORMS)
def test_a_model_as_people_write_it(text: str) -> None:
    assert str(parse_reference(text)) == FORMS[text]


NO_MODELS = {
    "ORG/Tiny:main": "write ORG/Tiny@main",
    "ORG/Tiny:Q4_K_M": "a type is chosen by --to",
    HOME + "datasets/ORG/Tiny": "datasets/",
    "hf://spaces/ORG/Tiny": "spaces/",
    HOME + "ORG/Tiny/tree/main/subfolder": "write ORG/Tiny",
    HOME + "ORG/Tiny/blob/v1/Tiny-Q8_0.gguf": "write ORG/Tiny@v1",
    HOME + "ORG/Tiny/discussions/3": "write ORG/Tiny, or ORG/Tiny@REVISION",
    HOME + "ORG": "write ORG/NAME",
    "https://hub.invalid/ORG/Tiny": "name another Hub by HF_ENDPOINT",
    "https://me:hf_secret@hub.invalid/ORG/Tiny": "name another Hub by HF_ENDPOINT",
    "ssh://git@hf.co/ORG/Tiny": "write ORG/NAME",
}


@pytest.mark.parametrize("text", NO_MODELS)
def test_an_address_that_names_no_model(text: str, hub: Hub) -> None:
    """Nothing else is converted in its place, and the message says what to write."""
    ran = plan(text)
    ran.refused(2, NO_MODELS[text])
    assert "hf_secret" not in ran.err
    assert not hub.requests


def test_addresses_of_the_configured_hub(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, model)
    for text in (f"{hub.endpoint}/{REPO}", f"{hub.endpoint}/{REPO}/tree/main"):
        assert plan_of(open_source(text)) == plan_of(open_checkpoint(model))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1/mirror/hf")
    assert parse_reference("http://127.0.0.1/mirror/hf/ORG/Tiny/tree/v1") == ModelReference("ORG/Tiny", "v1")


def test_a_repository_to_write_to_as_people_write_it() -> None:
    assert {check_name(text) for text in ("ORG/Tiny", "ORG/Tiny/", "hf.co/ORG/Tiny", HOME + "ORG/Tiny")} == {"ORG/Tiny"}
    for text in ("ORG/Tiny@v1", HOME + "ORG/Tiny/tree/v1", "Tiny"):
        with pytest.raises(UsageError, match="not the name of a repository"):
            check_name(text)


def test_renamed_repository_works_under_its_new_name(model: Path, hub: Hub) -> None:
    hub.add_repo("OLD/Name", model, renamed_to=REPO)
    checkpoint = open_source("OLD/Name")
    assert checkpoint.name == "Tiny"
    assert isinstance(checkpoint, HubCheckpoint)
    assert checkpoint.hub.name == REPO
    assert all("OLD" not in request.path for request in hub.requests if "/resolve/" in request.path)
    assert f'"repo": "{REPO}"' in plan("OLD/Name", "--json").done().out


def test_tokens_stay_with_the_hub(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private repo: every request to the Hub has the token, none to the host of the contents."""
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.add_repo(REPO, model, private=True)
    assert plan_of(open_source(REPO)) == plan_of(open_checkpoint(model))
    assert all(request.token == WRITE_TOKEN for request in hub.select(host="hub"))
    assert hub.select(host="cdn")
    assert not hub.leaked_tokens()
