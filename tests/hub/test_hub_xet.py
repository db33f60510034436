"""The client's own way where hf_xet is installed: uploads and downloads by xet, with a local folder of chunks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, snapshot_download

from tests.hub import WRITE_TOKEN, Hub, SparseFile
from tests.hub.conftest import noise

pytest.importorskip("hf_xet", reason="hf_xet is not installed")

FILES = {"config.json": b"{}", "a.gguf": noise(3_000_000), "sub/b.safetensors": noise(500_000, 1) + bytes(500_000)}


@pytest.fixture(autouse=True)
def xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client uses xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


def write_files(folder: Path) -> Path:
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def files_of(hub: Hub) -> dict[str, bytes]:
    return {path: content for path, content in hub.repo("ORG/M").files().items() if path != ".gitattributes"}


def test_upload_and_download_by_xet(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder")
    with Hub(xet=True) as hub:
        api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
        api.create_repo("ORG/M")
        api.upload_folder(repo_id="ORG/M", folder_path=folder)
        assert files_of(hub) == FILES
        assert hub.xet is not None
        stored = hub.xet.stored_bytes
        assert 3_500_000 < stored < 3_600_000  # zeros are compressed
        api.upload_folder(repo_id="ORG/M", folder_path=folder)
        (folder / "a.gguf").write_bytes(FILES["a.gguf"] + b"more")
        api.upload_folder(repo_id="ORG/M", folder_path=folder)
        assert files_of(hub) == {**FILES, "a.gguf": FILES["a.gguf"] + b"more"}
        assert hub.xet.stored_bytes - stored < 200_000  # of a changed file, the chunks that changed
        assert len(hub.select(path="*/commit/*")) == 2
        assert (hub.uploaded_bytes, hub.select(path="*.git/*")) == (0, [])
        copy = Path(snapshot_download("ORG/M", endpoint=hub.endpoint, token=WRITE_TOKEN))
        assert (copy / "sub" / "b.safetensors").read_bytes() == FILES["sub/b.safetensors"]
        assert hub.select(host="cdn") == []


def test_declared_files_can_be_downloaded_by_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub(xet=True) as hub:
        hub.add_repo("ORG/M", write_files(tmp_path / "folder"))
        hub.add_repo("ORG/BIG", {"virtual.gguf": SparseFile(b"GGUF", 5 << 30)})
        copy = Path(snapshot_download("ORG/M", endpoint=hub.endpoint, token=False))
        assert (copy / "a.gguf").read_bytes() == FILES["a.gguf"]
        assert hub.select(host="cdn") == []
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        copy = Path(snapshot_download("ORG/M", endpoint=hub.endpoint, token=False, cache_dir=tmp_path / "other"))
        assert (copy / "a.gguf").read_bytes() == FILES["a.gguf"]
        assert len(hub.select(host="cdn")) == 2
        api = HfApi(endpoint=hub.endpoint, token=False)
        hashes = [
            getattr(api.get_paths_info(repo, path)[0], "xet_hash", "")
            for repo, path in [("ORG/M", "a.gguf"), ("ORG/M", "config.json"), ("ORG/BIG", "virtual.gguf")]
        ]
        assert [value and len(value) for value in hashes] == [64, None, None]


def test_a_client_in_a_process_uploads_by_xet(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "folder")
    with Hub(xet=True) as hub:
        hub.add_repo("ORG/M", {})
        program = (
            f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='ORG/M', folder_path={str(folder)!r})"
        )
        environment = {**os.environ, **hub.environment(tmp_path / "home", WRITE_TOKEN)}
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        assert files_of(hub) == FILES
        assert hub.uploaded_bytes == 0
