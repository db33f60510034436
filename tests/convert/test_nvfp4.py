"""NVFP4: one scale for all that runtimes merge, wherever its members lie; found before they are encoded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamquant.convert.conversion import convert, disk_of
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.run.journal import Journal
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.open import open_source
from streamquant.convert.source.spool import GIB
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests import synthetic
from tests.attacks.harness import write_model
from tests.conftest import read_safetensors
from tests.hub import Hub
from tests.hub_source import REPO

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHARD_OF = {"q_proj": 1, "k_proj": 2, "v_proj": 3, "gate_proj": 3, "up_proj": 1}
G = "weight_global_scale"


@pytest.fixture(scope="module", autouse=True)
def _known_configs() -> Any:
    """The quantization_config is not what is tested here, and asking compressed-tensors for it takes 5 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "streamquant.convert.recipes.quantization_config._read_cache",
            lambda scheme: {"config_groups": {scheme: {}}, "ignore": ["lm_head"]},
        )
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one shard, whose members of a set have largest weights of their own."""
    folder = write_model(tmp_path_factory.mktemp("whole") / "Tiny", size=SIZE)
    tensors = load_file(folder / "model.safetensors")
    for number, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("_proj.weight"):
            tensor[1, 2] = -0.5 - 0.25 * (number % 5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def scattered(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, q, k and v of both layers in three shards: model_free_ptq refuses this one."""
    folder = tmp_path_factory.mktemp("scattered") / "Tiny"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {n: f"model-{SHARD_OF.get(n.split('.')[-2], 1):05d}-of-00003.safetensors" for n in tensors}
    for shard in sorted(set(names.values())):
        save_file({n: t for n, t in tensors.items() if names[n] == shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def made(source: Path, out: Path, options: ConversionOptions | None = None) -> dict[str, Any]:
    convert(make_plan(open_checkpoint(source), parse_variants(["nvfp4a16"]), options), out, RunOptions(jobs=2))
    return tensors_of(out)


def tensors_of(out: Path) -> dict[str, Any]:
    return {k: v for path in sorted(out.rglob("*.safetensors")) for k, v in read_safetensors(path).items()}


def scale_of(tensors: dict[str, Any], module: str) -> float:
    raw = tensors[f"{module}.{G}"][-1]
    return float(np.frombuffer(raw, "<f4")[0])


def test_members_in_different_shards_share_a_scale(whole: Path, scattered: Path, tmp_path: Path) -> None:
    """The bytes are those of one shard, which model_free_ptq's are compared with in test_compressed_parity.py."""
    expected, found = made(whole, tmp_path / "one"), made(scattered, tmp_path / "three")
    assert found == expected
    weights = load_file(whole / "model.safetensors")
    for layer in range(2):
        for block, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            modules = [f"model.layers.{layer}.{block}.{name}" for name in names]
            largest = max(weights[f"{module}.weight"].float().abs().max().item() for module in modules)
            (scale,) = {scale_of(found, module) for module in modules}
            assert scale == pytest.approx(2688 / largest, rel=0.01)
    shards = {path.name: read_safetensors(path) for path in (tmp_path / "three").rglob("*.safetensors")}
    first = shards["model-00001-of-00003.safetensors"]
    assert f"model.layers.1.self_attn.v_proj.{G}" in first, "all go to the shard of q, as with model_free_ptq"
    assert f"model.layers.1.mlp.up_proj.{G}" in shards["model-00003-of-00003.safetensors"]
    (result,) = verify(tmp_path / "three", open_checkpoint(scattered))
    assert not result.problems


def test_verify_finds_a_scale_that_is_not_shared(whole: Path, tmp_path: Path) -> None:
    made(whole, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    tensors = load_file(path)
    tensors[f"model.layers.0.self_attn.k_proj.{G}"] *= 2
    raw, before = bytearray(path.read_bytes()), load_file(path)[f"model.layers.0.self_attn.k_proj.{G}"]
    size = int.from_bytes(raw[:8], "little")
    start = 8 + size + json.loads(raw[8 : 8 + size])[f"model.layers.0.self_attn.k_proj.{G}"]["data_offsets"][0]
    assert raw[start : start + 4] == before.numpy().tobytes()
    raw[start : start + 4] = (before * 2).numpy().tobytes()
    path.write_bytes(raw)
    (result,) = verify(tmp_path, open_checkpoint(whole))
    assert any("k_proj" in problem and "damaged" in problem for problem in result.problems)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_gate_and_up_of_an_expert_share_a_scale(architecture: str, tmp_path: Path) -> None:
    """As in llm-compressor's oneshot: vLLM takes gate's scale for both. (w1 and w3 in Mixtral.)"""
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
    from llmcompressor.entrypoints.model_free.validate import validate_config

    source = synthetic.write_checkpoint(tmp_path / "Moe", architecture=architecture)
    weights = {k: v for path in sorted(source.glob("*.safetensors")) for k, v in load_file(path).items()}
    found = made(source, tmp_path / "out")
    gates = [name for name in weights if ".experts.1." in name and name.split(".")[-2] in ("gate_proj", "w1")]
    assert gates
    library = ModelFreePtqConverter(validate_config(None, "NVFP4A16", []))
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj").replace(".w1.", ".w3.")
        # the names under which this entry point shares a scale
        expected = library.process({"a.mlp.gate_proj.weight": weights[gate], "a.mlp.up_proj.weight": weights[up]})
        for name, stored in ((gate, "gate_proj"), (up, "up_proj")):
            for part in ("weight_packed", "weight_scale", G):
                raw = expected[f"a.mlp.{stored}.{part}"].contiguous().flatten().view(torch.uint8).numpy().tobytes()
                assert found[name.removesuffix("weight") + part][-1] == raw, (name, part)


def test_an_ignored_member_has_no_say(whole: Path, tmp_path: Path) -> None:
    weights = load_file(whole / "model.safetensors")
    options = ConversionOptions(ignore=("re:.*layers\\.0\\.self_attn\\.q_proj$",))
    found = made(whole, tmp_path, options)
    assert found["model.layers.0.self_attn.q_proj.weight"] == read_safetensors(whole / "model.safetensors").get(
        "model.layers.0.self_attn.q_proj.weight"
    )
    modules = [f"model.layers.0.self_attn.{name}" for name in ("k_proj", "v_proj")]
    largest = max(weights[f"{module}.weight"].float().abs().max().item() for module in modules)
    (scale,) = {scale_of(found, module) for module in modules}
    assert scale == pytest.approx(2688 / largest, rel=0.01)
    plan = make_plan(open_checkpoint(whole), parse_variants(["nvfp4a16"]), options)
    assert any("leaves model.layers.0.self_attn.q_proj alone" in note for note in plan.notes)


def test_the_plan_says_what_the_visit_costs(scattered: Path) -> None:
    plan = make_plan(open_checkpoint(scattered), parse_variants(["fp8-dynamic", "nvfp4a16"]))
    (note,) = [note for note in plan.notes if "read once more" in note]
    assert note.startswith("nvfp4a16: ")
    linear = sum(t.nbytes for name, t in plan.checkpoint.tensors.items() if name.endswith("_proj.weight"))
    assert plan.visited_bytes == linear
    assert not make_plan(open_checkpoint(scattered), parse_variants(["fp8-dynamic"])).visits


def test_visits_come_right_before_their_chunks(scattered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", 2000)
    plan = make_plan(open_checkpoint(scattered), parse_variants(["nvfp4a16"]))
    seen: set[int] = set()
    for number, chunk in enumerate(plan.chunks):
        seen |= {*plan.visits.get(number, ())}
        for output in plan.matrices[chunk.matrix].outputs:
            wanted = {n for n, c in enumerate(plan.chunks) if plan.matrices[c.matrix].source.name in output.amax_of}
            assert wanted <= seen
    visited = [number for numbers in plan.visits.values() for number in numbers]
    assert len(visited) == len(set(visited))


def test_on_the_hub_the_shards_of_a_set_are_there_together(
    scattered: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the least spool, many workers, and a set in three shards; one byte less is refused."""
    monkeypatch.setattr("streamquant.convert.plan.records.CHUNK_BYTES", 2000)
    hub.add_repo(REPO, scattered)
    checkpoint = open_source(REPO)
    plan = make_plan(checkpoint, parse_variants(["nvfp4a16"]), ConversionOptions(name="Tiny"))
    sizes = sum(file.size for file in checkpoint.files)
    assert disk_of(plan, RunOptions()).spool == sizes
    less = RunOptions(spool_gib=(sizes - 1) / GIB)
    with pytest.raises(StreamquantError, match="smaller than a shard"):
        disk_of(plan, less)
    with pytest.raises(StreamquantError, match="smaller than a shard"):
        convert(plan, tmp_path / "out", less)
    assert any("several shards, which are in the spool together" in note for note in plan.notes)
    convert(plan, tmp_path / "out", RunOptions(jobs=5, spool_gib=sizes / GIB))
    assert tensors_of(tmp_path / "out") == made(scattered, tmp_path / "local")


def test_what_the_journal_knows_is_not_visited_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is believed: another number gives other bytes, which is how it is seen."""
    expected = made(whole, tmp_path / "expected")
    name = "model.layers.0.mlp.down_proj.weight"
    first = Journal.open

    def knows(self: Journal, head: Any) -> Any:
        progress = first(self, head)
        return replace(progress, amax={name: 100.0})

    monkeypatch.setattr(Journal, "open", knows)
    found = made(whole, tmp_path / "found")
    changed = {key for key in found if found[key] != expected[key]}
    assert changed == {f"{name.removesuffix('weight')}{part}" for part in ("weight_packed", "weight_scale", G)}
    assert scale_of(found, name.removesuffix(".weight")) == pytest.approx(26.88, rel=0.01)


def test_a_weight_that_is_no_number_is_found_by_the_visit(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "Tiny"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StreamquantError, match=r"(?s)not a number.*v_proj.weight', row 3, column 5"):
        made(folder, tmp_path / "out")
