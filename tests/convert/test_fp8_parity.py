"""FP8 checkpoints against llm-compressor's model_free_ptq, byte for byte, and in transformers.

Where llm-compressor fails, in save_file with FP8_BLOCK and rows that are no multiple of 128, its converter is called
tensor by tensor; the bytes are those that it would write.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from examples.smollm2_checkpoint import FOLDER
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests import synthetic
from tests.conftest import Shelf, Tensor, read_safetensors

pytestmark = [pytest.mark.xdist_group("fp8-parity"), pytest.mark.timeout(900)]

VARIANTS = ("fp8-dynamic", "fp8-block")
LABEL = {name: RECIPES[name].label for name in VARIANTS}
SCHEME = {"fp8-dynamic": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK"}
LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 2816,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
# Arguments of write_checkpoint. FP8_BLOCK needs rows that are multiples of 128: llm-compressor fails on others.
SETTINGS: dict[str, dict[str, Any]] = {
    "wide": {"size": WIDE, "shards": 3, "pth": True},
    "wide-f16": {"size": {**WIDE, "hidden_size": 256, "intermediate_size": 384}, "dtype": "F16", "tied": True},
    "wide-f32": {"size": {**WIDE, "hidden_size": 256, "intermediate_size": 384}, "dtype": "F32", "shards": 2},
    "seed-oss": {"architecture": SEED_OSS, "size": "small"},
    "qwen3": {"architecture": QWEN3, "size": "small", "tied": True, "dtype": "F16"},
    "qwen3-moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "size": "small",
        "shards": 3,
        "moe_intermediate_size": 128,
        "num_experts": 5,
    },
    "glm": {"architecture": "Glm4MoeForCausalLM", "size": "small", "shards": 3, "moe_intermediate_size": 128},
}
CASES = (pytest.param("smollm2", marks=pytest.mark.long), *SETTINGS)
IGNORE = ["lm_head", "model.embed_tokens"]
MTP = ["re:.*eh_proj$", "re:.*shared_head.head$", "re:.*embed_tokens$"]
ROUTERS = {"qwen3-moe": ["re:.*mlp.gate$"], "glm": ["re:.*mlp.gate$", *MTP]}
"""What is left alone beside IGNORE, as in llm-compressor's examples for mixtures of experts, and what vLLM wants plain
of layers for multi-token prediction."""

# Runs inside a subprocess, all jobs in one: torch and llm-compressor take seconds to import.
REFERENCE = """
import json, sys
from pathlib import Path
from llmcompressor import model_free_ptq
from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
from llmcompressor.entrypoints.model_free.save_utils import update_config
from llmcompressor.entrypoints.model_free.validate import validate_config
from safetensors import safe_open
from safetensors.torch import save_file

for job in json.loads(sys.argv[1]):
    if not job["by_tensor"]:
        model_free_ptq(job["source"], job["out"], scheme=job["scheme"], ignore=job["ignore"], device="cpu")
        continue
    source, out = Path(job["source"]), Path(job["out"])
    out.mkdir(parents=True)
    converter = ModelFreePtqConverter(validate_config(None, job["scheme"], job["ignore"]))
    for shard in sorted(source.glob("*.safetensors")):
        done = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                done.update(converter.process({name: file.get_tensor(name)}))
        save_file({name: tensor.contiguous() for name, tensor in done.items()}, out / shard.name)
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the reference; by_tensor: through its converter, and the files saved by the driver."""

    source: str
    out: str
    scheme: str
    ignore: list[str]
    by_tensor: bool = False


def run_driver(code: str, argument: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, argument]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def write_source(case: str, folder: Path) -> None:
    synthetic.write_checkpoint(folder, **SETTINGS[case])
    (folder / "tokenizer.json").write_text('{"not": "read for FP8"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")


class Pairs:
    """Checkpoints, our FP8 variants and the reference's."""

    def __init__(self, request: pytest.FixtureRequest, shelf: Shelf) -> None:
        self.request = request
        self.shelf = shelf

    def source(self, case: str) -> Path:
        if case == "smollm2":
            return self.fixture("smollm2")
        return self.shelf.get(f"fp8-source-{case}", lambda folder: write_source(case, folder / case)) / case

    def fixture(self, name: str) -> Path:
        folder = self.request.getfixturevalue(name)
        assert isinstance(folder, Path)
        return folder

    def ours(self, case: str, variant: str) -> Path:
        if case == "smollm2":
            return self.fixture("smollm2_variants") / f"{FOLDER}-{LABEL[variant]}"
        source = self.source(case)
        out = self.shelf.get(
            f"fp8-ours-{case}",
            lambda folder: convert(
                make_plan(open_checkpoint(source), parse_variants(list(VARIANTS))), folder, RunOptions(jobs=2)
            ),
        )
        return out / f"{case}-{LABEL[variant]}"

    def reference(self, case: str, variant: str) -> Path:
        return self.shelf.get("fp8-references", self.run_reference) / f"{case}-{variant}"

    def run_reference(self, folder: Path) -> None:
        """All cases that this run asks for and whose source is there, in one process."""
        items = [item for item in self.request.session.items if isinstance(item, pytest.Function)]
        calls: list[Any] = [i.callspec.params for i in items if i.function is test_tensors_equal_llm_compressor]
        asked: set[str] = {call["case"] for call in calls} | {"wide"}  # whose config is compared with more than its own
        jobs = []
        for case in asked:
            try:
                source = self.source(case)
            except pytest.skip.Exception:
                continue
            # The reference refuses files that its index does not name: it gets a clean copy.
            clean = str(without_other_weights(source, folder / f"{case}-source"))
            for variant in VARIANTS:
                by_tensor = fails_in_the_reference(case, variant)
                ignore = [*IGNORE, *ROUTERS.get(case, [])]
                jobs.append(asdict(Job(clean, str(folder / f"{case}-{variant}"), SCHEME[variant], ignore, by_tensor)))
        run_driver(REFERENCE, json.dumps(jobs))


def fails_in_the_reference(case: str, variant: str) -> bool:
    """SmolLM2's rows of 576 weights: 576 % 128 != 0."""
    return (case, variant) == ("smollm2", "fp8-block")


def without_other_weights(source: Path, folder: Path) -> Path:
    """A folder of links to the files of a checkpoint."""
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in ("consolidated.safetensors", "pytorch_model.bin"):
            link = folder / path.name
            if not link.exists():
                link.hardlink_to(path)
    return folder


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, shelf: Shelf) -> Pairs:
    return Pairs(request, shelf)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def differing(ours: Path, reference: Path) -> list[str]:
    """Names of the tensors that differ between two files."""
    one, other = read_safetensors(ours), read_safetensors(reference)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_tensors_equal_llm_compressor(pairs: Pairs, case: str, variant: str) -> None:
    ours, reference = pairs.ours(case, variant), pairs.reference(case, variant)
    shards = sorted(path.name for path in ours.glob("*.safetensors"))
    assert shards == sorted(path.name for path in reference.glob("*.safetensors"))
    assert shards == [file.name for file in open_checkpoint(pairs.source(case)).files]
    assert {shard: differing(ours / shard, reference / shard) for shard in shards} == {shard: [] for shard in shards}
    kinds = {tensor[0] for shard in shards for tensor in read_safetensors(ours / shard).values()}
    dtype = SETTINGS.get(case, {}).get("dtype", "BF16")
    assert kinds == {"F8_E4M3", dtype} | ({"F32"} if case == "glm" else set())  # biases of routers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_config_and_index_equal_llm_compressor(pairs: Pairs, case: str, variant: str) -> None:
    ours = pairs.ours(case, variant)
    reference = pairs.reference(case, variant)
    if fails_in_the_reference(case, variant):  # no config and index came of it: those of its scheme, and of its files
        other = pairs.reference("wide", variant)
        assert read_json(ours / "config.json") == {
            **read_json(pairs.source(case) / "config.json"),
            "quantization_config": read_json(other / "config.json")["quantization_config"],
        }
        return
    assert (ours / "config.json").read_text().strip() == (reference / "config.json").read_text().strip()
    index = "model.safetensors.index.json"
    if len(list(ours.glob("*.safetensors"))) > 1:
        assert read_json(ours / index)["weight_map"] == read_json(reference / index)["weight_map"]
        assert (
            read_json(ours / index)["metadata"]["total_size"] == read_json(reference / index)["metadata"]["total_size"]
        )


def test_reading_finds_a_difference(pairs: Pairs, tmp_path: Path) -> None:
    """The proof that the comparison can fail: one bit."""
    shard = next(pairs.ours("seed-oss", "fp8-dynamic").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    (tmp_path / "x.safetensors").write_bytes(content)
    assert len(differing(shard, tmp_path / "x.safetensors")) == 1


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["smollm2", "wide", "wide-f16"])
def test_index_is_consistent(pairs: Pairs, case: str, variant: str) -> None:
    folder = pairs.ours(case, variant)
    check_index(folder)


def check_index(folder: Path) -> None:
    shards = {path.name: read_safetensors(path) for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        assert list(shards) == ["model.safetensors"]
        return
    content = read_json(index)
    assert content["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(len(data) for tensors in shards.values() for _, _, data in tensors.values())
    assert content["metadata"]["total_size"] == total


@pytest.mark.parametrize("limit", [6_000_000, 10**9])
def test_max_shard_size(pairs: Pairs, tmp_path: Path, limit: int) -> None:
    """Other shards, the same tensors."""
    source = pairs.source("wide")
    convert(
        make_plan(open_checkpoint(source), parse_variants(["fp8-block"]), ConversionOptions(max_shard_size=limit)),
        tmp_path,
        RunOptions(jobs=2),
    )
    (folder,) = tmp_path.iterdir()
    check_index(folder)
    found: dict[str, Tensor] = {}
    sizes = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        sizes.append(sum(len(data) for _, _, data in tensors.values()))
        found |= tensors
    expected: dict[str, Tensor] = {}
    for path in pairs.ours("wide", "fp8-block").glob("*.safetensors"):
        expected |= read_safetensors(path)
    assert found == expected
    assert max(sizes) <= limit
    assert len(sizes) == 1 or min(a + b for a, b in itertools.pairwise(sizes)) > limit / 2
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(names)
    assert names == ["model.safetensors"] if count == 1 else all(
        re.fullmatch(rf"model-\d{{5}}-of-{count:05d}.safetensors", name) for name in names
    )  # fmt: skip


def test_side_files_come_along_and_other_weights_do_not(pairs: Pairs) -> None:
    source, folder = pairs.source("wide"), pairs.ours("wide", "fp8-dynamic")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    side = {"README.md", "LICENSE", "generation_config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"}
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    assert present == side | shards | {"config.json", "model.safetensors.index.json", "streamquant.json"}
    assert [name for name in side if (folder / name).read_bytes() != (source / name).read_bytes()] == []
    left = {"original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin"}
    assert [name for name in left if not (source / name).is_file()] == []


# --- in transformers ------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
def logits(folder, prompts):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0].float() for ids in prompts]
    return found, {key: sorted(map(str, value)) for key, value in info.items()}, type(model).__name__
results = []
for source, folders, prompts in json.loads(sys.argv[1]):
    base, _, _ = logits(source, prompts)
    for folder in folders:
        ours, info, kind = logits(folder, prompts)
        cosines = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(ours, base)]
        exact = [torch.equal(a, b) for a, b in zip(ours, base)]
        results.append({"info": info, "class": kind, "cosines": cosines, "exact": exact})
print("RESULT" + json.dumps(results))
"""
PROMPTS = (
    "Gravity is one of the four fundamental forces of nature. It makes apples fall from trees, keeps the Moon on its"
    " way around the Earth, and holds the stars of a galaxy together. Isaac Newton described it in 1687, and Albert",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n\n"
    "def factorial(n):\n    if n == 0:\n        return 1\n    return n *",
    "Dear Sir or Madam,\n\nI am writing to you about the bicycle that I bought in your shop last week. The front wheel"
    " does not turn, the bell makes no sound, and one of the pedals fell off on my way home. I would like to",
)


@pytest.fixture(scope="module")
def loaded(pairs: Pairs, shelf: Shelf) -> dict[str, dict[str, Any]]:
    """What transformers says of SmolLM2 in fp8-dynamic, whole and damaged, and of the wide model in both variants."""
    smollm2, wide = pairs.source("smollm2"), pairs.source("wide")
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    texts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    numbers = [list(range(start, 500, 13)) for start in (3, 7)]
    names = ("smollm2 fp8-dynamic", "damaged", "wide fp8-dynamic", "wide fp8-block")

    def make(folder: Path) -> None:
        damaged = folder / "damaged"
        shutil.copytree(pairs.ours("smollm2", "fp8-dynamic"), damaged)
        double_scales(sorted(damaged.glob("*.safetensors"))[1])
        jobs = [
            (str(smollm2), [str(pairs.ours("smollm2", "fp8-dynamic")), str(damaged)], texts),
            (str(wide), [str(pairs.ours("wide", variant)) for variant in VARIANTS], numbers),
        ]
        output = run_driver(LOAD, json.dumps(jobs))
        (folder / "result.json").write_text(output.partition("RESULT")[2])

    return dict(zip(names, read_json(shelf.get("fp8-loaded", make) / "result.json"), strict=True))


# FP8 weights and activations cost a model of 135M weights more than a large one: llm-compressor's files, which are
# equal byte for byte, give the same.
LEAST_COSINE = {"smollm2 fp8-dynamic": 0.96, "wide fp8-dynamic": 0.99, "wide fp8-block": 0.99}


@pytest.mark.parametrize("name", LEAST_COSINE)
def test_loads_in_transformers(loaded: dict[str, dict[str, Any]], name: str) -> None:
    """compressed-tensors finds every key it wants and no other, and the model says what the original says."""
    result = loaded[name]
    assert result["class"] == "LlamaForCausalLM"
    assert {key: value for key, value in result["info"].items() if value} == {}
    assert {"missing_keys", "unexpected_keys"} <= result["info"].keys()
    assert min(result["cosines"]) > LEAST_COSINE[name]
    assert not any(result["exact"]), "equal logits would mean that nothing was quantized"


def test_rows_that_do_not_fill_a_group_are_noted(pairs: Pairs) -> None:
    """SmolLM2 in fp8-block has llm-compressor's bytes, but compressed-tensors cannot group its activations."""
    block = parse_variants(["fp8-block"])
    ragged, full = (make_plan(open_checkpoint(pairs.source(case)), block).notes for case in ("smollm2", "wide"))
    assert [note for note in ragged if "cannot group the activations" in note]
    assert not [note for note in full if "cannot group" in note]


def test_a_wrong_scale_would_show(loaded: dict[str, dict[str, Any]]) -> None:
    """The proof that the check of the logits can fail: down_proj's scales doubled in one shard."""
    assert max(loaded["damaged"]["cosines"]) < LEAST_COSINE["smollm2 fp8-dynamic"]


def double_scales(path: Path) -> None:
    """Add 1 to the exponents of the BF16 scales of down_proj."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = 0
    for name, entry in header.items():
        if name.endswith("down_proj.weight_scale"):
            start, stop = (8 + length + at for at in entry["data_offsets"])
            scales = np.frombuffer(content[start:stop], "<u2") + 0x80
            content[start:stop] = scales.astype("<u2").tobytes()
            changed += 1
    assert changed
    path.write_bytes(content)
