"""The Hub as readers see it through the unmodified client, its errors, and the Hub in a process of its own."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, get_session, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, HubProcess, SparseFile
from tests.hub.conftest import UPLOADS, noise

FILES = {
    "config.json": b'{"a": 1}',
    "README.md": b"---\nlicense: mit\n---\n# Model\n",
    "original/params.json": b"{}",
    "original/more/notes.txt": b"notes",
    "model.safetensors": noise(300_000),
}


def write_folder(folder: Path) -> Path:
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Information


def test_model_info_tells_sizes_and_hashes(hub: Hub, anonymous: HfApi) -> None:
    repo = hub.add_repo("ORG/M", FILES)
    info = anonymous.model_info("ORG/M", files_metadata=True)
    head = repo.resolve()
    assert head is not None
    assert info.sha == head.oid
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert {item.rfilename: item.size for item in info.siblings or []} == {p: len(c) for p, c in FILES.items()}
    weights = next(item for item in info.siblings or [] if item.rfilename == "model.safetensors")
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert weights.lfs.pointer_size == 43 + 76 + len("size 300000\n")
    config = next(item for item in info.siblings or [] if item.rfilename == "config.json")
    assert config.lfs is None
    assert config.blob_id == hashlib.sha1(b"blob 8\0" + FILES["config.json"]).hexdigest()


def test_tree_by_pages(anonymous: HfApi) -> None:
    with Hub(page_size=2) as hub:
        hub.add_repo("ORG/M", FILES)
        api = HfApi(endpoint=hub.endpoint, token=False)
        top = list(api.list_repo_tree("ORG/M", expand=True))
        everything = list(api.list_repo_tree("ORG/M", recursive=True))
        below = [item.path for item in api.list_repo_tree("ORG/M", "original/more")]
        assert len(hub.select(path="*/tree/main")) == 2 + 4
    assert [item.path for item in top] == ["README.md", "config.json", "model.safetensors", "original"]
    assert all(item.last_commit is not None and item.last_commit.title == "initial commit" for item in top)
    assert {item.path for item in everything if isinstance(item, RepoFile)} == set(FILES)
    assert {item.path for item in everything if isinstance(item, RepoFolder)} == {"original", "original/more"}
    assert below == ["original/more/notes.txt"]


def test_paths_info(hub: Hub, anonymous: HfApi) -> None:
    hub.add_repo("ORG/M", FILES)
    found = anonymous.get_paths_info("ORG/M", ["original", "model.safetensors", "missing"], expand=True)
    assert [(type(item), item.path) for item in found] == [(RepoFile, "model.safetensors"), (RepoFolder, "original")]


def test_whoami_refs_and_commits(hub: Hub, api: HfApi) -> None:
    repo = hub.add_repo("ORG/M", FILES)
    second = repo.add_commit({"config.json": b"{}", "README.md": None}, title="second")
    repo.tags["v1"] = second.oid
    refs = api.list_repo_refs("ORG/M")
    assert api.whoami()["name"] == "alice"
    assert [(ref.name, ref.target_commit) for ref in (*refs.branches, *refs.tags)] == [
        ("main", second.oid),
        ("v1", second.oid),
    ]
    assert [commit.title for commit in api.list_repo_commits("ORG/M")] == ["second", "initial commit"]


@pytest.mark.parametrize("revision", ["old", "v1", "refs/heads/old", None])
def test_revisions(hub: Hub, anonymous: HfApi, revision: str | None) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"old"})
    old = repo.branches["main"]
    repo.branches["old"] = repo.tags["v1"] = old
    repo.add_commit({"a.txt": b"new"})
    path = hf_hub_download("ORG/M", "a.txt", revision=revision or old, endpoint=hub.endpoint, token=False)
    assert Path(path).read_bytes() == b"old"
    assert Path(hf_hub_download("ORG/M", "a.txt", endpoint=hub.endpoint, token=False)).read_bytes() == b"new"
    assert anonymous.model_info("ORG/M", revision=revision or old).sha == old


def test_the_same_history_has_the_same_oids(tmp_path: Path) -> None:
    with Hub() as one, Hub() as other:
        assert one.add_repo("ORG/M", FILES).branches == other.add_repo("ORG/M", FILES).branches


# Content


@pytest.mark.parametrize("cdn", [True, False])
def test_snapshot_of_a_folder(tmp_path: Path, cdn: bool) -> None:
    with Hub(cdn=cdn) as hub:
        hub.add_repo("ORG/M", write_folder(tmp_path / "source"))
        folder = snapshot_download("ORG/M", endpoint=hub.endpoint, token=READ_TOKEN, local_dir=tmp_path / "copy")
        assert hub.sent_by_file() == {path: len(content) for path, content in FILES.items()}
        assert hub.leaked_tokens() == []
        assert {request.token for request in hub.select(host="hub")} == {READ_TOKEN}
        assert len(hub.select(host="cdn", method="GET")) == int(cdn)
    copy = {path: content for path, content in read_folder(Path(folder)).items() if not path.startswith(".cache")}
    assert copy == FILES


def test_range_reads(hub: Hub) -> None:
    hub.add_repo("ORG/M", FILES)
    content = FILES["model.safetensors"]
    with HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True).open(
        "ORG/M/model.safetensors", block_size=1000, cache_type="none"
    ) as file:
        file.seek(1000)
        assert file.read(500) == content[1000:1500]
    assert [request.range for request in hub.select(host="cdn")] == ["bytes=1000-1499"]
    url = hf_hub_url("ORG/M", "model.safetensors", endpoint=hub.endpoint)
    for header, status, expected, place in [
        ("bytes=299990-", 206, content[-10:], "bytes 299990-299999/300000"),
        ("bytes=-10", 206, content[-10:], "bytes 299990-299999/300000"),
        ("bytes=0-999999", 206, content, "bytes 0-299999/300000"),
        ("bytes=300000-", 416, b"", "bytes */300000"),
        ("bytes=0-1,5-6", 200, content, None),
    ]:
        answer = get_session().get(url, headers={"Range": header})
        assert (answer.status_code, answer.content, answer.headers.get("Content-Range")) == (status, expected, place)


def test_a_repo_of_800_gigabytes_without_disk(hub: Hub, anonymous: HfApi) -> None:
    shards = {
        f"model-{i:05}-of-00191.safetensors": SparseFile(b"header %d" % i, 4_300_000_000 + i) for i in range(1, 192)
    }
    hub.add_repo("ORG/M", shards)
    start = time.monotonic()
    info = anonymous.model_info("ORG/M", files_metadata=True)
    assert sum(item.size or 0 for item in info.siblings or []) == 191 * 4_300_000_000 + 191 * 192 // 2
    for i, name in enumerate(shards, 1):
        answer = get_session().get(
            hf_hub_url("ORG/M", name, endpoint=hub.endpoint), headers={"Range": f"bytes=0-{len(shards[name].header)}"}
        )
        assert answer.content == b"header %d\0" % i
    assert time.monotonic() - start < 10
    assert sum(request.sent for request in hub.requests) < 200_000
    tail = {"Range": "bytes=4299999999-"}
    answer = get_session().get(
        hf_hub_url("ORG/M", "model-00191-of-00191.safetensors", endpoint=hub.endpoint), headers=tail
    )
    assert answer.content == bytes(192)


def test_a_url_of_the_cdn_needs_its_signature(hub: Hub) -> None:
    hub.add_repo("ORG/M", FILES)
    answer = get_session().head(hf_hub_url("ORG/M", "model.safetensors", endpoint=hub.endpoint), follow_redirects=False)
    location = answer.headers["Location"]
    assert (answer.status_code, answer.headers["X-Linked-Size"]) == (302, "300000")
    assert answer.headers["X-Linked-ETag"] == f'"{hashlib.sha256(FILES["model.safetensors"]).hexdigest()}"'
    assert get_session().get(location).content == FILES["model.safetensors"]
    assert get_session().get(location[:-1] + "?").status_code == 403
    assert get_session().get(location.split("?")[0]).status_code == 403


def test_a_renamed_repo(hub: Hub, anonymous: HfApi) -> None:
    hub.add_repo("ORG/OLD", FILES, renamed_to="ORG/NEW")
    assert anonymous.model_info("ORG/OLD").id == "ORG/NEW"
    path = hf_hub_download("ORG/OLD", "model.safetensors", endpoint=hub.endpoint, token=False)
    assert Path(path).read_bytes() == FILES["model.safetensors"]
    assert {request.status for request in hub.select(path="*/OLD*")} == {307}


def test_datasets_are_repos_of_their_own(hub: Hub, anonymous: HfApi) -> None:
    hub.add_repo("ORG/M", {"a.txt": b"model"})
    hub.add_repo("ORG/M", {"a.txt": b"dataset", "b.gz": b"gz"}, kind="dataset")
    for name, content in [("a.txt", b"dataset"), ("b.gz", b"gz")]:
        path = hf_hub_download("ORG/M", name, repo_type="dataset", endpoint=hub.endpoint, token=False)
        assert Path(path).read_bytes() == content
    assert len(anonymous.dataset_info("ORG/M").siblings or []) == 2


# Errors


@pytest.mark.parametrize(
    ("repo", "token", "error", "status"),
    [
        ("ORG/missing", False, RepositoryNotFoundError, 401),
        ("ORG/missing", READ_TOKEN, RepositoryNotFoundError, 404),
        ("ORG/private", False, RepositoryNotFoundError, 401),
        ("ORG/private", READ_TOKEN, RepositoryNotFoundError, 404),
        ("ORG/gated", False, GatedRepoError, 401),
        ("ORG/gated", READ_TOKEN, GatedRepoError, 403),
    ],
)
def test_repos_that_are_not_for_everybody(
    hub: Hub, repo: str, token: str | bool, error: type[HfHubHTTPError], status: int
) -> None:
    hub.add_repo("ORG/private", FILES, private=True)
    hub.add_repo("ORG/gated", FILES, gated="manual", granted=("carol",))
    hub.add_token("hf_carol", "carol", "read")
    with pytest.raises(error) as caught:
        hf_hub_download(repo, "config.json", endpoint=hub.endpoint, token=token)
    assert type(caught.value) is error
    assert caught.value.response.status_code == status
    with pytest.raises(error):
        HfApi(endpoint=hub.endpoint, token=token).auth_check(repo)
    for name, other in [("ORG/private", WRITE_TOKEN), ("ORG/gated", WRITE_TOKEN), ("ORG/gated", "hf_carol")]:
        path = hf_hub_download(name, "config.json", endpoint=hub.endpoint, token=other)
        assert Path(path).read_bytes() == FILES["config.json"]


def test_what_is_not_there(hub: Hub, api: HfApi) -> None:
    hub.add_repo("ORG/M", FILES)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("ORG/M", revision="nope")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("ORG/M", "config.json", revision="0" * 40, endpoint=hub.endpoint, token=False)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("ORG/M", "nope.json", endpoint=hub.endpoint, token=False)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("ORG/M", "nope"))
    assert not api.file_exists("ORG/M", "nope.json")
    assert api.repo_exists("ORG/M")


def test_a_token_that_the_hub_does_not_know(hub: Hub) -> None:
    hub.add_repo("ORG/M", FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info("ORG/M")
    assert type(caught.value) is HfHubHTTPError
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()


# Processes


def test_a_client_in_a_process(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("ORG/M", FILES, gated="auto", granted=("bob",))
    program = "from huggingface_hub import snapshot_download; print(snapshot_download('ORG/M'))"
    environment = {**os.environ, **hub.environment(tmp_path / "home", READ_TOKEN)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert read_folder(folder) == FILES


@UPLOADS
def test_the_hub_in_a_process(tmp_path: Path) -> None:
    write_folder(tmp_path / "root" / "ORG" / "M")
    (tmp_path / "root" / "ORG" / "M" / "huge.gguf").touch()
    os.truncate(tmp_path / "root" / "ORG" / "M" / "huge.gguf", 5 << 30)
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps([{"path": "*/config.json", "flip": [0, -1]}]))
    with HubProcess(tmp_path / "root", "--faults", str(faults), "--invent-above", str(1 << 30)) as hub:
        path = hf_hub_download("ORG/M", "config.json", endpoint=hub.endpoint, token=False)
        assert Path(path).read_bytes() == FILES["config.json"]  # the fault went to the HEAD request
        hub.arm(Fault(path="*/README.md", status=418), Fault(path="*", times=None, probability=0))
        with pytest.raises(HfHubHTTPError, match="418"):
            HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).get_hf_file_metadata(
                url=hf_hub_url("ORG/M", "README.md", endpoint=hub.endpoint)
            )
        assert hub.fired() == [1, 1, 0]
        hub.disarm()
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        api.upload_file(path_or_fileobj=noise(1000), path_in_repo="x.gguf", repo_id="ORG/M")
        files = hub.files("ORG/M")
        assert files["x.gguf"] == (1000, hashlib.sha256(noise(1000)).hexdigest())
        assert files["huge.gguf"] == (5 << 30, hashlib.sha256(b"huge.gguf 5368709120").hexdigest())  # invented
        assert [(r.method, r.status, r.token) for r in hub.requests if r.path.endswith("README.md")] == [
            ("HEAD", 418, WRITE_TOKEN)
        ]
        assert hub.environment(tmp_path)["HF_ENDPOINT"] == hub.endpoint
        hub.stop(signal.SIGKILL)
        assert len(hub.requests) > 5
