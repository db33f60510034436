"""The Hub as writers see it through the unmodified client."""

import hashlib
import io
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from tests.hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, lost_commit
from tests.hub.conftest import UPLOADS, noise

pytestmark = UPLOADS

CARD = "---\nlicense: mit\nbase_model: ORG/BASE\nbase_model_relation: quantized\n---\n# Model\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b"{}",
    "empty.txt": b"",
    "model-Q8_0.gguf": noise(250_000, 1),
    "imatrix/imatrix.dat": b"\0" + noise(5_000, 2),
}
LFS_BYTES = 250_000 + 5_001


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files on disk."""
    folder = tmp_path / "folder"
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def files_of(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    """What the repo holds besides the .gitattributes that the Hub made itself."""
    return {path: content for path, content in hub.repo("ORG/M").files(revision).items() if path != ".gitattributes"}


def test_create_repo(hub: Hub, api: HfApi) -> None:
    url = api.create_repo("ORG/M", private=True)
    assert (url.repo_id, hub.repo("ORG/M").private, files_of(hub)) == ("ORG/M", True, {})
    assert api.create_repo("ORG/M", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("ORG/M")
    assert api.create_repo("mine").repo_id == "alice/mine"
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: You don't have the rights to create a model under the na"):
        api.create_repo("OTHER/M")
    api.update_repo_settings("ORG/M", private=False)
    assert not hub.repo("ORG/M").private
    api.move_repo("ORG/M", "ORG/N")
    assert api.model_info("ORG/M").id == "ORG/N"
    api.delete_repo("ORG/N")
    assert not api.repo_exists("ORG/N")


@pytest.mark.parametrize("part_size", [64 << 20, 100_000])
def test_upload_folder_and_again(folder: Path, part_size: int) -> None:
    with Hub(part_size=part_size) as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        api.create_repo("ORG/M")
        first = api.upload_folder(repo_id="ORG/M", folder_path=folder)
        assert files_of(hub) == FILES
        assert hub.uploaded_bytes == LFS_BYTES
        assert len(hub.select(method="PUT")) == (4 if part_size == 100_000 else 2)
        again = api.upload_folder(repo_id="ORG/M", folder_path=folder)
        assert again.oid == first.oid
        (folder / "model-Q4_0.gguf").write_bytes(noise(1000, 3))
        api.upload_folder(repo_id="ORG/M", folder_path=folder)
        assert hub.uploaded_bytes == LFS_BYTES + 1000
        assert [request.status for request in hub.select(path="*/commit/*")] == [200, 200]
        assert hub.leaked_tokens() == []
        assert not list((hub.root / "incoming").iterdir())


@pytest.mark.skipif(not hasattr(HfApi, "upload_large_folder"), reason="this huggingface_hub has it no more (2.0)")
@pytest.mark.filterwarnings("ignore:\\s*=+\\s*`upload_large_folder`:FutureWarning")
def test_upload_large_folder(hub: Hub, api: HfApi, folder: Path) -> None:
    api.upload_large_folder(
        repo_id="ORG/M", folder_path=folder, repo_type="model", print_report=False, num_workers=1, private=True
    )
    assert files_of(hub) == FILES


def test_an_object_that_is_there_but_not_committed_is_not_sent_again(hub: Hub, api: HfApi) -> None:
    api.create_repo("ORG/M")
    api.preupload_lfs_files("ORG/M", [CommitOperationAdd("a.gguf", noise(1000))])
    assert (hub.uploaded_bytes, files_of(hub)) == (1000, {})
    api.upload_file(path_or_fileobj=noise(1000), path_in_repo="b.gguf", repo_id="ORG/M")
    assert (hub.uploaded_bytes, files_of(hub)) == (1000, {"b.gguf": noise(1000)})


def test_a_dataset(hub: Hub, api: HfApi) -> None:
    api.create_repo("ORG/M", repo_type="dataset")
    api.upload_file(path_or_fileobj=noise(100), path_in_repo="a.gz", repo_id="ORG/M", repo_type="dataset")
    assert hub.repo("ORG/M", "dataset").files()["a.gz"] == noise(100)
    assert set(hub.repos) == {"datasets/ORG/M"}


def test_the_client_does_not_fall_back_from_xet(hub: Hub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet", reason="the client uploads by LFS where hf_xet is not installed")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.add_repo("ORG/M", {})
    with pytest.raises(ConnectionError, match=r"404 Not Found.*xet-write-token"):
        api.upload_file(path_or_fileobj=noise(100), path_in_repo="a.gz", repo_id="ORG/M")
    api.upload_file(path_or_fileobj=io.BytesIO(noise(100)), path_in_repo="a.gz", repo_id="ORG/M")
    assert files_of(hub) == {"a.gz": noise(100)}


def test_pull_requests(hub: Hub, api: HfApi) -> None:
    hub.add_repo("ORG/M", {"a.txt": b"a"})
    hub.add_token("hf_carol", "carol", "write")
    guest = HfApi(endpoint=hub.endpoint, token="hf_carol")
    commit = guest.upload_file(path_or_fileobj=noise(9), path_in_repo="b.gguf", repo_id="ORG/M", create_pr=True)
    assert (commit.pr_revision, commit.pr_num) == ("refs/pr/1", 1)
    assert files_of(hub) == {"a.txt": b"a"}
    assert files_of(hub, "refs/pr/1") == {"a.txt": b"a", "b.gguf": noise(9)}
    with pytest.raises(HfHubHTTPError, match="403"):
        guest.merge_pull_request("ORG/M", 1)
    second = api.create_pull_request("ORG/M", "another")
    assert second.git_reference == "refs/pr/2"
    api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="ORG/M", revision="refs/pr/2")
    assert files_of(hub, "refs/pr/2") == {"a.txt": b"a", "c.txt": b"c"}
    api.merge_pull_request("ORG/M", 1)
    assert files_of(hub) == {"a.txt": b"a", "b.gguf": noise(9)}
    assert len(api.list_repo_refs("ORG/M", include_pull_requests=True).pull_requests or []) == 2


def test_branches_and_deletions(hub: Hub, api: HfApi) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"a", "dir/b.txt": b"b", "dir/c.txt": b"c"})
    api.create_branch("ORG/M", branch="v2")
    api.create_tag("ORG/M", tag="t")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("ORG/M", branch="v2")
    api.create_commit("ORG/M", [CommitOperationDelete("dir/")], commit_message="x", revision="v2")
    assert (set(files_of(hub)), set(files_of(hub, "v2"))) == ({"a.txt", "dir/b.txt", "dir/c.txt"}, {"a.txt"})
    api.delete_file("a.txt", "ORG/M")
    assert set(files_of(hub)) == {"dir/b.txt", "dir/c.txt"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("a.txt", "ORG/M")
    api.delete_branch("ORG/M", branch="v2")
    assert (set(repo.branches), set(repo.tags)) == ({"main"}, {"t"})


def test_a_commit_on_an_old_parent_is_refused(hub: Hub, api: HfApi) -> None:
    parent = hub.add_repo("ORG/M", {"a.txt": b"a"}).branches["main"]
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="ORG/M", parent_commit=parent)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: nonsense", '"license" must be one of'),
        ("license: mit\nbase_model_relation: copied", '"base_model_relation" must be one of'),
        ("base_model: a b c", '"base_model" with value "a b c" is not valid'),
        ("tags: [1, 2]", '"tags" must be a string or a list'),
        ("a: [", "YAML metadata is not valid"),
        ("pipeline_tag: [a]", '"pipeline_tag" must be a string'),
    ],
)
def test_cards_that_the_hub_refuses(hub: Hub, api: HfApi, front: str, message: str) -> None:
    hub.add_repo("ORG/M", {})
    with pytest.raises(ValueError, match="Invalid metadata") as caught:
        api.upload_file(path_or_fileobj=f"---\n{front}\n---\n".encode(), path_in_repo="README.md", repo_id="ORG/M")
    assert message in str(caught.value)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# no front matter", path_in_repo="README.md", repo_id="ORG/M")


@pytest.mark.parametrize(("token", "status"), [(READ_TOKEN, 403), ("hf_dave", 403), (False, 401), ("hf_wrong", 401)])
def test_who_may_not_write(hub: Hub, token: str | bool, status: int) -> None:
    hub.add_repo("ORG/M", {"a.txt": b"a"})
    hub.add_token("hf_dave", "dave", "read", ("ORG",))
    api = HfApi(endpoint=hub.endpoint, token=token)
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M")
    assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="must use a write token" if status == 403 else "401"):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M", create_pr=True)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("ORG/N")
    assert (files_of(hub), set(hub.repos)) == ({"a.txt": b"a"}, {"ORG/M"})


def test_a_repo_that_is_missing(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M")


def test_files_that_gitignore_names_are_left_out(hub: Hub, api: HfApi) -> None:
    hub.add_repo("ORG/M", {".gitignore": b"*.log\n/build/\n"})
    names = ("a.txt", "a.log", "build/x.txt", "sub/b.log")
    api.create_commit("ORG/M", [CommitOperationAdd(name, b"text") for name in names], commit_message="x")
    assert set(files_of(hub)) == {".gitignore", "a.txt"}


def test_files_above_the_limit_are_refused(tmp_path: Path) -> None:
    with Hub(file_limit=1000) as hub:
        hub.add_repo("ORG/M", {})
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        with pytest.raises(ValueError, match="larger than 1000 bytes"):
            api.upload_file(path_or_fileobj=noise(1001), path_in_repo="b.gguf", repo_id="ORG/M")


def test_uploads_are_checked(hub: Hub, api: HfApi) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"a"})
    oid = hashlib.sha256(noise(1000)).hexdigest()
    url = hub.sign("cdn", f"/upload/ORG/M/{oid}/1000")
    assert get_session().put(url, content=noise(999)).status_code == 400
    assert get_session().put(url, content=noise(1000, 1)).status_code == 400
    assert get_session().put(url.split("?")[0], content=noise(1000)).status_code == 403
    assert repo.objects == {}
    assert get_session().put(url, content=iter([noise(1000)])).status_code == 200  # chunked transfer
    assert set(repo.objects) == {oid}
    line = '{"key": "lfsFile", "value": {"path": "b.gguf", "oid": "%s", "size": 9}}\n' % ("0" * 64)
    answer = get_session().post(
        f"{hub.endpoint}/api/models/ORG/M/commit/main",
        content='{"key": "header", "value": {"summary": "x"}}\n' + line,
        headers={"Authorization": f"Bearer {WRITE_TOKEN}"},
    )
    assert (answer.status_code, "a file that does not exist" in answer.text) == (400, True)
    assert set(repo.files()) == {"a.txt"}


# Faults of uploads


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503, times=2),
        Fault(cut_after=100_000),
        Fault(reset_after=1),
        Fault(hang_up=True),
    ],
)
def test_a_put_that_fails_is_made_again(hub: Hub, api: HfApi, waits: list[float], fault: Fault) -> None:
    hub.add_repo("ORG/M", {"a.txt": b"a"})
    fault.method = "PUT"
    hub.arm(fault)
    api.upload_file(path_or_fileobj=noise(2_000_000), path_in_repo="b.gguf", repo_id="ORG/M")
    assert files_of(hub)["b.gguf"] == noise(2_000_000)
    assert fault.fired == fault.times
    assert len(hub.select(method="PUT")) == fault.fired + 1
    assert waits == [1, 2][: fault.fired]


def test_a_put_that_always_fails(hub: Hub, api: HfApi, waits: list[float]) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"a"})
    hub.arm(Fault(method="PUT", status=500, times=None))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'b\.gguf'"):
        api.upload_file(path_or_fileobj=noise(1000), path_in_repo="b.gguf", repo_id="ORG/M")
    assert (files_of(hub), repo.objects, len(waits)) == ({"a.txt": b"a"}, {}, 5)


def test_a_commit_whose_answer_is_lost(hub: Hub, api: HfApi) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"a"})
    hub.arm(lost_commit())
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(path_or_fileobj=noise(1000), path_in_repo="b.gguf", repo_id="ORG/M")
    assert files_of(hub) == {"a.txt": b"a", "b.gguf": noise(1000)}
    api.upload_file(path_or_fileobj=noise(1000), path_in_repo="b.gguf", repo_id="ORG/M")
    assert (len(list(repo.history())), hub.uploaded_bytes) == (2, 1000)


@pytest.mark.parametrize("status", [409, 412, 500])
def test_a_commit_that_is_refused(hub: Hub, api: HfApi, status: int) -> None:
    repo = hub.add_repo("ORG/M", {"a.txt": b"a"})
    hub.arm(Fault(method="POST", path="*/commit/*", status=status))
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M")
    assert (caught.value.response.status_code, len(list(repo.history()))) == (status, 1)
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ORG/M")
    assert len(list(repo.history())) == 2
