"""Which files hold the weights, what a model is called, and folders that hold no model: adapters, Mistral's layout."""

import json
import os
import shutil
from pathlib import Path

import pytest

from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.weights import INDEX, SINGLE_FILE
from streamquant.quant.errors import StreamquantError
from tests import gguf_peer, synthetic
from tests.attacks.harness import checksums, edit_json, pack, run, shards_of, unpack, write_model
from tests.conftest import TINY_PRE, write_small_tokenizer
from tests.convert.test_side_files import make_snapshot
from tests.gguf_peer import read_gguf
from tests.hub import Hub
from tests.hub_source import REPO, files

TO = ("--to", "fp8-dynamic", "--to", "gguf:Q8_0")


def notes_of(folder: Path) -> str:
    return "\n".join(make_plan(open_checkpoint(folder), parse_variants(["fp8-dynamic"])).notes)


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """The same model in model.safetensors, and in two shards with an index."""
    folder = write_model(tmp_path / "Tiny", shards=2)
    write_model(tmp_path / "single" / "Tiny")
    shutil.copy(tmp_path / "single" / "Tiny" / SINGLE_FILE, folder)
    return folder


def test_what_an_index_without_metadata_costs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "Tiny", shards=2)
    assert "metadata" not in notes_of(folder)
    record = json.loads((folder / INDEX).read_text())
    for metadata, loads in (({}, True), (None, False), ([], False)):
        (folder / INDEX).write_text(json.dumps({**record, "metadata": metadata}))
        assert ("transformers does not load it" not in notes_of(folder)) is loads
        if loads:
            AutoModelForCausalLM.from_pretrained(folder)
        else:
            with pytest.raises(TypeError):
                AutoModelForCausalLM.from_pretrained(folder)
    del record["metadata"]
    (folder / INDEX).write_text(json.dumps(record))
    assert f'WARNING: {INDEX} has no "metadata"' in notes_of(folder)


# An index beside model.safetensors


def test_the_single_file_goes_before_an_index(both: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "new" / "Tiny", seed=1)
    shutil.copy(tmp_path / "new" / "Tiny" / SINGLE_FILE, both)
    run("convert", both, *TO, "--out", tmp_path / "out").done()
    run("convert", tmp_path / "new" / "Tiny", *TO, "--out", tmp_path / "expected").done()
    names = ("Tiny-GGUF/Tiny-Q8_0.gguf", "Tiny-FP8-dynamic/model.safetensors")
    found, expected = checksums(tmp_path / "out"), checksums(tmp_path / "expected")
    assert [found[name] for name in names] == [expected[name] for name in names]
    assert f"Tiny-FP8-dynamic/{INDEX}" not in found
    assert "ANOTHER MODEL ('lm_head.weight' has other weights in" in notes_of(both)


def test_transformers_loads_the_single_file(both: Path, tmp_path: Path) -> None:
    """The proof of what is followed."""
    from transformers import AutoModelForCausalLM

    write_model(tmp_path / "new" / "Tiny", seed=1)
    shutil.copy(tmp_path / "new" / "Tiny" / SINGLE_FILE, both)
    loaded, new = (AutoModelForCausalLM.from_pretrained(path) for path in (both, tmp_path / "new" / "Tiny"))
    assert (loaded.lm_head.weight == new.lm_head.weight).all()


def test_what_is_said_of_an_index_that_is_passed_over(both: Path) -> None:
    assert "hold the same tensors, as far as their beginnings tell" in notes_of(both)
    header, data = unpack(shards_of(both)[0])
    shards_of(both)[0].write_bytes(pack({f"x.{k}" if k != "__metadata__" else k: e for k, e in header.items()}, data))
    assert "WARNING" in notes_of(both)
    assert "only one of them has" in notes_of(both)
    shards_of(both)[0].write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "the index or a file of it is broken" in notes_of(both)
    shards_of(both)[0].unlink()
    assert "1 of 2 files of the index are not there" in notes_of(both)
    (both / INDEX).write_text("{}")
    assert "the index or a file of it is broken (broken index)" in notes_of(both)
    (both / INDEX).unlink()
    assert INDEX not in notes_of(both)


def test_the_hub_s_single_file_goes_before_an_index_too(both: Path, hub: Hub) -> None:
    hub.add_repo(REPO, files(both))
    ran = run("plan", REPO, *TO).done()
    assert f"{SINGLE_FILE} is converted, as transformers loads it" in " ".join(ran.out.split())
    assert "hold the same tensors, as far as their beginnings tell" in " ".join(ran.out.split())


def test_an_index_beside_a_single_file_of_the_hub_is_compared(both: Path, hub: Hub) -> None:
    write_model(both.parent / "new" / "Tiny", seed=1)
    shutil.copy(both.parent / "new" / "Tiny" / SINGLE_FILE, both)
    hub.add_repo(REPO, files(both))
    assert "ANOTHER MODEL ('lm_head.weight' has other weights in" in " ".join(run("plan", REPO, *TO).done().out.split())
    hub.add_repo("ORG/Part", {name: data for name, data in files(both).items() if "-00002-of-" not in name})
    assert "1 of 2 files of the index are not there" in " ".join(run("plan", "ORG/Part", *TO).done().out.split())


# transformers_weights of config.json


@pytest.mark.parametrize("index", [False, True])
def test_weights_that_config_names_go_before_all_others(both: Path, tmp_path: Path, index: bool) -> None:
    """As transformers loads them, which is asked; the FP8 folder has its own files, and its config.json no such key."""
    from transformers import AutoModelForCausalLM

    new = write_model(tmp_path / "new" / "Tiny", seed=1, shards=2 if index else 1)
    if index:
        renamed = {path.name: f"ema-{path.name}" for path in shards_of(new)}
        for old, name in renamed.items():
            shutil.copy(new / old, both / name)
        weight_map = json.loads((new / INDEX).read_text())["weight_map"]
        named = "ema.safetensors.index.json"
        (both / named).write_text(
            json.dumps({"metadata": {}, "weight_map": {key: renamed[file] for key, file in weight_map.items()}})
        )
    else:
        named = "ema.safetensors"
        shutil.copy(new / SINGLE_FILE, both / named)
    edit_json(both / "config.json", transformers_weights=named)
    theirs, expected = (AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in (both, new))
    assert (theirs == expected).all()
    run("convert", both, *TO, "--out", tmp_path / "out").done()
    run("convert", new, *TO, "--out", tmp_path / "expected").done()
    name = "Tiny-GGUF/Tiny-Q8_0.gguf"
    assert checksums(tmp_path / "out")[name] == checksums(tmp_path / "expected")[name]
    made = tmp_path / "out" / "Tiny-FP8-dynamic"
    assert "transformers_weights" not in json.loads((made / "config.json").read_text())
    assert set(json.loads((made / INDEX).read_text())["weight_map"].values()) == {p.name for p in shards_of(made)}
    assert f"config.json names {named} as the weights" in notes_of(both)
    assert f"llama.cpp's converter would take {SINGLE_FILE}" in notes_of(both)


@pytest.mark.parametrize(
    "named", ["pytorch_model.bin", "adapter_model.bin", "../Tiny/model.safetensors", "a/b.safetensors", "", 7, [], {}]
)
def test_weights_that_config_cannot_name(both: Path, named: object) -> None:
    edit_json(both / "config.json", transformers_weights=named)
    run("plan", both, *TO).refused(1, "config.json names weights that cannot be read", "transformers_weights")


def test_weights_that_config_names_and_nobody_has(both: Path) -> None:
    edit_json(both / "config.json", transformers_weights="ema.safetensors")
    run("plan", both, *TO).refused(1, "config.json names weights that are not there", "ema.safetensors")
    edit_json(both / "config.json", transformers_weights=None)
    run("plan", both, *TO).done()


def test_weights_that_config_names_on_the_hub(both: Path, hub: Hub) -> None:
    (both / SINGLE_FILE).rename(both / "ema.safetensors")
    edit_json(both / "config.json", transformers_weights="ema.safetensors")
    hub.add_repo(REPO, files(both))
    assert "config.json names ema.safetensors as the weights" in " ".join(run("plan", REPO, *TO).done().out.split())


def test_an_index_of_one_file_makes_an_index(tmp_path: Path) -> None:
    """Without it transformers finds nothing in the FP8 folder."""
    source = write_model(tmp_path / "Tiny")
    (source / SINGLE_FILE).rename(source / "model-00001-of-00001.safetensors")
    names = [name for name in unpack(shards_of(source)[0])[0] if name != "__metadata__"]
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    run("convert", source, *TO, "--out", tmp_path / "out").done()
    made = json.loads((tmp_path / "out" / "Tiny-FP8-dynamic" / INDEX).read_text())["weight_map"]
    assert set(made.values()) == {"model-00001-of-00001.safetensors"}


# Shards without an index


@gguf_peer.requires_converter
def test_numbered_shards_need_no_index(tmp_path: Path) -> None:
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer", add_bos_token=True)
    source = synthetic.write_checkpoint(tmp_path / "Tiny", shards=3, tokenizer=tokenizer, size="small")
    (source / INDEX).unlink()
    to = ("--to", "gguf:BF16", "--to", "fp8-dynamic", "--pre", TINY_PRE)
    run("convert", source, *to, "--out", tmp_path / "out").done()
    theirs = gguf_peer.synthetic_pre(source, "bf16", tmp_path / "theirs.gguf", pre=TINY_PRE)
    assert (tmp_path / "out" / "Tiny-GGUF" / "Tiny-BF16.gguf").read_bytes() == theirs.read_bytes()
    made = json.loads((tmp_path / "out" / "Tiny-FP8-dynamic" / INDEX).read_text())["weight_map"]
    assert len(set(made.values())) == 3
    assert "the names say that the 3 shards are all of them" in notes_of(source)


def test_missing_shards_are_missed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Tiny", shards=3)
    (source / INDEX).unlink()
    shards_of(source)[1].unlink()
    run("plan", source, *TO).refused(1, "without an index, and not all", "2 of 3; model-00002-of-00003", "download")


def test_shards_without_an_index_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    source = write_model(tmp_path / "Tiny", shards=3)
    content = files(source)
    del content[INDEX]
    hub.add_repo(REPO, content)
    run("plan", REPO, *TO).done()


def test_two_sets_and_other_names_are_not_guessed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Tiny", shards=2)
    (source / INDEX).unlink()
    shutil.copy(shards_of(source)[0], source / "model-00001-of-00001.safetensors")
    run("plan", source, *TO).refused(1, "no weights to convert", "without an index")
    for path in shards_of(source)[1:]:
        path.unlink()
    shards_of(source)[0].rename(source / "weights.safetensors")
    run("plan", source, *TO).refused(1, "no weights to convert", f"call it {SINGLE_FILE}")


# Names


def general_name(out: Path) -> tuple[str, str]:
    (path,) = out.rglob("*.gguf")
    return path.name, str(read_gguf(path)[0]["general.name"][1])


@gguf_peer.requires_converter
def test_a_model_is_called_as_its_folder_was_given(tmp_path: Path) -> None:
    source = synthetic.write_checkpoint(
        tmp_path / "store" / "0123abc",
        tokenizer=write_small_tokenizer(tmp_path / "tokenizer", add_bos_token=True),
        size="small",
        extra_side_files=False,
    )
    link = tmp_path / "My-Model-7B"
    link.symlink_to(source)
    run("convert", link, "--to", "gguf:BF16", "--pre", TINY_PRE, "--out", tmp_path / "out").done()
    theirs = gguf_peer.synthetic_pre(link, "bf16", tmp_path / "theirs.gguf", pre=TINY_PRE)
    assert general_name(tmp_path / "out") == ("My-Model-7B-BF16.gguf", "My Model 7B")
    assert (tmp_path / "out" / "My-Model-7B-GGUF" / "My-Model-7B-BF16.gguf").read_bytes() == theirs.read_bytes()


def test_a_snapshot_is_called_by_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source")
    (source / "README.md").unlink()
    snapshot = make_snapshot(tmp_path / "hub", source)
    (tmp_path / "Linked-3B").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    expected = {str(snapshot): "Tiny", f"{snapshot}/": "Tiny", ".": "Tiny", str(tmp_path / "Linked-3B"): "Linked-3B"}
    expected[os.path.relpath(tmp_path / "Linked-3B")] = "Linked-3B"
    for number, (given, name) in enumerate(expected.items()):
        out = tmp_path / f"out{number}"
        run("convert", given, "--to", "gguf:Q8_0", "--out", out).done()
        assert general_name(out) == (f"{name}-Q8_0.gguf", name.replace("-", " "))


# What is no model


def write_adapter(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "some/base-model", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    entry = {"dtype": "F32", "shape": [8, 64], "data_offsets": [0, 2048]}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    (folder / "adapter_model.safetensors").write_bytes(pack({name: entry}, bytes(2048)))
    return folder


ADAPTER_WORDS = ("an adapter, not a model", "LORA of 'some/base-model'", "merge_and_unload", "save_pretrained")


@pytest.mark.parametrize("config", [False, True])
def test_an_adapter_is_no_model(config: bool, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    if config:
        shutil.copy(write_model(tmp_path / "Tiny") / "config.json", folder)
    run("plan", folder, *TO).refused(1, *ADAPTER_WORDS, str(folder))


def test_an_adapter_on_the_hub(tmp_path: Path, hub: Hub) -> None:
    hub.add_repo(REPO, files(write_adapter(tmp_path / "adapter")))
    run("plan", REPO, *TO).refused(1, *ADAPTER_WORDS, REPO)


def test_an_adapter_beside_a_model_is_left_out(tmp_path: Path) -> None:
    source = write_adapter(write_model(tmp_path / "Tiny"))
    assert "adapter_config.json is left out" in notes_of(source)
    run("convert", source, *TO, "--out", tmp_path / "out").done()
    assert not list((tmp_path / "out").rglob("adapter*"))


@pytest.mark.parametrize("part", ["lora_A.default", "base_layer", "modules_to_save.default", "lora_magnitude_vector"])
def test_a_model_around_which_an_adapter_is_wrapped(part: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "Tiny")
    header, data = unpack(source / SINGLE_FILE)
    old = "model.layers.0.self_attn.q_proj.weight"
    header[old.replace(".weight", f".{part}.weight")] = header.pop(old)
    (source / SINGLE_FILE).write_bytes(pack(header, data))
    run("plan", source, *TO).refused(1, "LoRA adapter are not merged", part, "merge_and_unload")


def test_mistral_s_own_layout(tmp_path: Path, hub: Hub) -> None:
    source = write_model(tmp_path / "Tiny")
    words = ("Mistral's own layout", "consolidated.safetensors", "convert_mistral_weights_to_hf.py")
    (source / SINGLE_FILE).rename(source / "consolidated.safetensors")
    run("plan", source, *TO).refused(1, *words)
    for number in (1, 2):
        shutil.copy(source / "consolidated.safetensors", source / f"consolidated-0000{number}-of-00002.safetensors")
    run("plan", source, *TO).refused(1, words[0])
    (source / "config.json").rename(source / "params.json")
    run("plan", source, *TO).refused(1, words[0])
    for number in (1, 2):
        (source / f"consolidated-0000{number}-of-00002.safetensors").unlink()
    hub.add_repo(REPO, files(source))
    run("plan", REPO, *TO).refused(1, *words)


def test_empty_tensors_of_zero_3(tmp_path: Path) -> None:
    source = write_model(tmp_path / "Tiny")
    header, data = unpack(source / SINGLE_FILE)
    last = max(header, key=lambda name: header[name]["data_offsets"][1] if name != "__metadata__" else 0)
    start, stop = header[last]["data_offsets"]
    header[last] |= {"shape": [0], "data_offsets": [start, start]}
    (source / SINGLE_FILE).write_bytes(pack(header, data[: start - stop]))
    with pytest.raises(StreamquantError, match="tensor without weights") as caught:
        open_checkpoint(source)
    assert "zero_to_fp32.py" in str(caught.value)
    edit_json(source / "config.json", x=1)
