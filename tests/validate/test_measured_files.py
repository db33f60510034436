"""A report says which bytes it is about: names, sizes, and the hashes of the manifest beside the files."""

import json
from collections.abc import Sequence
from pathlib import Path

from streamquant.convert.manifest import MANIFEST
from streamquant.validate.readback.measured_files import MeasuredFile, measured_files, weight_files

SHA = "ab" * 32


def write_manifest(folder: Path, files: Sequence[object]) -> None:
    record = {"manifest": 1, "source": {"files": []}, "variants": {"gguf:Q8_0": {"files": files}}}
    (folder / MANIFEST).write_text(json.dumps(record))


def entry(path: str, size: int = 3, sha256: str = SHA) -> dict[str, object]:
    return {"path": path, "size": size, "sha256": sha256}


def test_hashes_come_from_the_manifest_of_the_folder_or_of_the_one_above(tmp_path: Path) -> None:
    parts = tmp_path / "M-Q8_0"
    parts.mkdir()
    paths = [tmp_path / "M.gguf", parts / "M-00002-of-00002.gguf", parts / "M-00001-of-00002.gguf"]
    for path in paths:
        path.write_bytes(b"abc")
    write_manifest(tmp_path, [entry(path.relative_to(tmp_path).as_posix()) for path in paths])
    found = measured_files(paths)
    assert found == tuple(MeasuredFile(name, 3, SHA) for name in sorted(path.name for path in paths))


def test_a_manifest_counts_for_the_file_that_it_names_in_its_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "M.gguf"
    path.write_bytes(b"abc")
    lists: tuple[Sequence[object], ...] = (
        [],
        [entry("M.gguf", size=4)],
        [entry("other/M.gguf")],
        [entry("M.gguf", sha256="x" * 64)],
        [{"path": "M.gguf", "size": 3}],
        [None, 3, "M.gguf"],
    )
    for files in lists:
        write_manifest(tmp_path, files)
        assert measured_files([path]) == (MeasuredFile("M.gguf", 3, None),)
    write_manifest(tmp_path, [entry("M.gguf")])
    assert measured_files([path])[0].sha256 == SHA
    (tmp_path / MANIFEST).write_text("{")
    assert measured_files([path]) == (MeasuredFile("M.gguf", 3, None),)


def test_a_file_that_is_gone_is_left_out(tmp_path: Path) -> None:
    assert measured_files([tmp_path / "M.gguf"]) == ()


def test_the_files_of_what_cannot_be_read(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert weight_files(tmp_path / "M.gguf") == (tmp_path / "M.gguf",)
