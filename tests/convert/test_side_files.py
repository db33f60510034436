"""The files beside the weights: which come along, and that none is a link to something that is not the model's."""

import os
from pathlib import Path

import pytest

from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.config_as_stored import MODELOPT
from streamquant.convert.source.open import open_source
from streamquant.convert.source.side_files import is_side_file, read_side_file
from streamquant.hub.repo import open_repo
from tests.attacks.harness import checksums, run, shards_of, write_model
from tests.hub import Hub
from tests.hub_source import REPO, files

WANTED = [
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("qwen.tiktoken", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool use.jinja"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("README.md", "LICENSE", "LICENSE.txt", "LICENSE.pdf", "Notice.txt", "NOTICE", "USE_POLICY.md", "LICENSE-2.0.txt"),
    *("Qwen LICENSE AGREEMENT", "llama3.1_license.txt", "COPYING", "CITATION.cff", "modeling_mine.py"),
]
"""What a runtime or a person needs."""
LEFT = [
    *("adapter_config.json", "trainer_state.json", "all_results.json", "training_args.bin", "imatrix.dat", "notes.txt"),
    *("events.out.tfevents.1700000000.host.1.0", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "model.gguf"),
    *(
        "quantize_config.json",
        "hf_quant_config.json",
        "streamquant.json",
        "params.json",
        ".gitattributes",
        "license.key",
    ),
    *("wandb-summary.json", "credentials.json", "token", "id_rsa", "train.py", "pytorch_model.bin.index.json", "x.md"),
    *("model.safetensors.index.json.bak", "license.bin", "eval/results.json", "runs/x", "license_key.txt"),
    *("onnx/tokenizer.json", "additional_chat_templates/notes.txt"),
]
"""What tools and people leave beside a model."""
BESIDE = "the secret that lies beside the model"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model that is changed, and a secret beside its folder."""
    (tmp_path / "secret.txt").write_text(BESIDE)
    return write_model(tmp_path / "Tiny", shards=2)


def test_files_are_chosen_by_name() -> None:
    assert [name for name in WANTED if not is_side_file(name, 100)] == []
    assert [name for name in LEFT if is_side_file(name, 100)] == []
    assert not is_side_file("tokenizer.json", 1 << 30)


def test_what_is_chosen_comes_along_and_all_else_does_not(source: Path, tmp_path: Path) -> None:
    for name in (*WANTED, *LEFT):
        path = source / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}")
    for name in ("modules.json", "chat_template.json"):  # these are read
        (source / name).unlink()
    (source / "tokenizer.model").unlink()
    run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "out").done()
    found, given = checksums(tmp_path / "out" / "Tiny-FP8-dynamic"), checksums(source)
    ours = {"config.json", "model.safetensors.index.json", "streamquant.json", *(p.name for p in shards_of(source))}
    present = {name for name in WANTED if name in given}
    assert set(found) == present | ours
    assert {name: found[name] for name in present} == {name: given[name] for name in present}


SIDE = [
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "chat_template.jinja",
    "additional_chat_templates/a.jinja",
    "config.json",
]


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize("to", ["fp8-dynamic", "gguf:Q8_0"])
def test_a_link_out_of_the_folder_is_refused(name: str, to: str, source: Path, tmp_path: Path) -> None:
    path, elsewhere = source / name, tmp_path / "elsewhere"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text(BESIDE)
    path.symlink_to(elsewhere)
    for command in ("plan", "convert"):
        more = ("--out", tmp_path / "out") if command == "convert" else ()
        run(command, source, "--to", to, *more).refused(1, "a link that leads out", name, str(elsewhere))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["relative", "through a folder", "of a link"])
def test_there_are_many_kinds_of_links(kind: str, source: Path, tmp_path: Path) -> None:
    name = "LICENSE"
    (source / name).unlink(missing_ok=True)
    match kind:
        case "relative":
            (source / name).symlink_to("../secret.txt")
        case "through a folder":
            (tmp_path / "templates").mkdir()
            (tmp_path / "templates" / "a.jinja").write_text(BESIDE)
            (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
        case "of a link":
            (source / "inside").symlink_to(tmp_path / "secret.txt")
            (source / name).symlink_to("inside")
    run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "out").refused(1, "a link that leads out")


def test_a_link_of_no_use_stays_behind(source: Path, tmp_path: Path) -> None:
    """notes.txt -> a token: nobody needs notes, so nobody reads them."""
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    to = ("--to", "fp8-dynamic", "--to", "gguf:Q8_0")
    assert "left alone: notes.txt" in " ".join(run("plan", source, *to).done().out.split())
    run("convert", source, *to, "--out", tmp_path / "out").done()
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and BESIDE.encode() in path.read_bytes()
    ]


def test_links_inside_and_linked_shards_are_fine(source: Path, tmp_path: Path) -> None:
    """A farm of links to shards elsewhere is common; so is LICENSE -> LICENSE.txt."""
    plain = run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "plain", "--name", "Tiny").done()
    assert plain
    (tmp_path / "store").mkdir()
    for path in sorted(source.glob("*.safetensors")):
        path.rename(tmp_path / "store" / path.name)
        path.symlink_to(tmp_path / "store" / path.name)
    (source / "LICENSE").rename(source / "LICENSE.txt")
    (source / "LICENSE").symlink_to("LICENSE.txt")
    run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "out").done()
    out, of_plain = (checksums(tmp_path / name / "Tiny-FP8-dynamic") for name in ("out", "plain"))
    del of_plain["streamquant.json"]
    assert out.items() >= of_plain.items()
    assert not (tmp_path / "out" / "Tiny-FP8-dynamic" / "LICENSE").is_symlink()


def make_snapshot(cache: Path, source: Path) -> Path:
    """The files of a folder as the Hub's client keeps them: blobs, and a snapshot of links to them."""
    repository = cache / "models--ORG--Tiny"
    snapshot = repository / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_client_s_cache_is_fine(source: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "hub", source)
    for option, folder in (("", snapshot), ("again", tmp_path / "link")):
        if option:
            folder.symlink_to(snapshot)
        out = tmp_path / f"out{option}"
        run("convert", folder, "--to", "fp8-dynamic", "--out", out, "--name", "Tiny").done()
        assert (out / "Tiny-FP8-dynamic" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_another_repository_s_blobs_are_elsewhere(source: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "hub", source)
    other = tmp_path / "hub" / "models--ORG--Private" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text(BESIDE)
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../../models--ORG--Private/blobs/0")
    run("plan", snapshot, "--to", "fp8-dynamic").refused(1, "a link that leads out", "LICENSE")


def test_a_link_that_is_made_after_the_plan(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(folder: Path, name: str) -> bytes:
        if name == "LICENSE":
            (source / name).unlink()
            (source / name).symlink_to(tmp_path / "secret.txt")
        return read_side_file(folder, name)

    monkeypatch.setattr("streamquant.convert.conversion.read_side_file", swap)
    run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "out").refused(1, "a link that leads out")
    assert not (tmp_path / "out" / "Tiny-FP8-dynamic" / "LICENSE").exists()


def test_a_pipe_in_place_of_a_side_file_is_not_waited_for(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").unlink(missing_ok=True)
    os.mkfifo(source / "LICENSE")
    assert "LICENSE" not in open_checkpoint(source).side_files
    run("convert", source, "--to", "fp8-dynamic", "--out", tmp_path / "out").done()


def test_the_hub_s_files_are_chosen_by_name_too(source: Path, hub: Hub) -> None:
    content = files(source) | dict.fromkeys((*WANTED, *LEFT), b"{}") | files(source)
    hub.add_repo(REPO, content)
    checkpoint = open_source(REPO)
    assert set(checkpoint.side_files) == set(WANTED)
    open_repo(REPO)
    assert not {request.file for request in hub.requests} & {*LEFT} - {MODELOPT}, "planning reads what ModelOpt says"
