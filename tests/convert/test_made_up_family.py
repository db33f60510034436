"""docs/adding-an-architecture.md keeps its promise: a new family needs the files that it names, and no other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamquant.convert.architectures import FAMILIES
from tests import synthetic
from tests.conftest import TINY_PRE, write_small_tokenizer
from tests.peers import ROOT

ROOMS = ("quant", "files", "hub", "convert", "model", "calibrate", "validate", "publish", "streamquant")
PAGE = ROOT / "docs" / "adding-an-architecture.md"
EXAMPLES = {"convert/recipes/catalogue.py"}
"""Files that take one model as an example: Llama 2 7B, over whose tensors bits per weight are counted."""

FAMILY_FILE = '''
"""MadeUpForCausalLM: Llama with a norm after the feed-forward, as llama.cpp's arch "grok" has it."""

import dataclasses

import gguf

from streamquant.convert.architectures.family import LlamaCpp, VocabularyRules, norm
from streamquant.convert.architectures.families.llama import LLAMA
from streamquant.convert.architectures.gguf_keys import u32

MADE_UP = dataclasses.replace(
    LLAMA,
    hf_architecture="MadeUpForCausalLM",
    model_type="made_up",
    layer=(*LLAMA.layer, norm("post_feedforward_layernorm")),
    llama_cpp=LlamaCpp(
        arch=gguf.MODEL_ARCH.GROK,
        vocabulary=VocabularyRules(no_bos=frozenset({320})),
        keys=(u32(gguf.Keys.LLM.VOCAB_SIZE, "vocabulary"),),
    ),
)
'''

# Run with the changed package: the class is registered with transformers, as a new version of it would bring it.
READ_BACK = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.validate.logits.comparison import differences

class MadeUpConfig(LlamaConfig):
    model_type = "made_up"

class NormedMLP(LlamaMLP):
    after = None  # not a module of its own: the layer has it
    def forward(self, x):
        return self.after[0](super().forward(x))

class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = NormedMLP(config)
            layer.post_feedforward_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            layer.mlp.after = (layer.post_feedforward_layernorm,)
        self.post_init()

AutoConfig.register("made_up", MadeUpConfig)
AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM)
source, *paths = map(Path, sys.argv[1:])
tokens = torch.arange(64).reshape(2, 32) * 3
resident = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
with torch.inference_mode():
    expected = resident(tokens).logits
original = open_variant(source)
found = {}
for path in [source, *paths]:
    variant = open_variant(path)
    logits = all_logits(variant, tokens.numpy(), Setting(dtype="f32", weights_only=True))
    found[path.name] = {
        "architecture": variant.description.hf_architecture,
        "problems": [str(problem) for problem in [*variant.problems, *differences(original, variant)]],
        "difference": float((logits - expected).abs().max() / expected.abs().max()),
        "metadata": {
            key: value for key, value in getattr(variant, "metadata", {}).items() if not isinstance(value, list)
        },
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package streamquant that is this one, and the made-up family added to it."""
    root = tmp_path_factory.mktemp("package")
    mirror(ROOT / "streamquant", root / "streamquant", except_for="convert")
    mirror(ROOT / "convert", root / "streamquant" / "convert", except_for="architectures")
    folder = root / "streamquant" / "convert" / "architectures"
    shutil.copytree(ROOT / "convert" / "architectures", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "families" / "made_up.py").write_text(FAMILY_FILE)
    listed = (folder / "__init__.py").read_text()
    added = listed.replace("FAMILIES = (", "FAMILIES = (MADE_UP, ").replace(
        "from streamquant.convert.architectures.families.mistral.mistral import",
        "from streamquant.convert.architectures.families.made_up import MADE_UP\n"
        "from streamquant.convert.architectures.families.mistral.mistral import",
    )
    assert added.count("MADE_UP") == 2
    (folder / "__init__.py").write_text(added)
    return root


def mirror(source: Path, target: Path, *, except_for: str) -> None:
    """A folder of links to all that is in `source` but one."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in (except_for, "__pycache__"):
            (target / path.name).symlink_to(path.resolve())


def run(package: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    folder = synthetic.write_checkpoint(
        root / "Made-Up", size="small", dtype="F16", tokenizer=write_small_tokenizer(root / "tokenizer")
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MadeUpForCausalLM"], "model_type": "made_up"}
    (folder / "config.json").write_text(json.dumps(config))
    assert config["vocab_size"] == 320, "as in FAMILY_FILE"
    path = folder / "model.safetensors"
    random, hidden = np.random.default_rng(5), config["hidden_size"]
    bits = load_file(path)
    for layer in range(config["num_hidden_layers"]):
        like = bits[f"model.layers.{layer}.input_layernorm.weight"]
        bits[f"model.layers.{layer}.post_feedforward_layernorm.weight"] = random.permutation(like)
        assert like.shape == (hidden,)
    save_file(bits, path)
    return folder


@pytest.mark.timeout(600)
def test_a_made_up_family_goes_all_the_way(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    variants = ["--to", "gguf:F32,Q8_0", "--to", "fp8-dynamic", "--pre", TINY_PRE]
    planned = run(package, "-m", "streamquant", "plan", str(checkpoint), *variants)
    assert "MadeUpForCausalLM" in planned
    run(package, "-m", "streamquant", "convert", str(checkpoint), *variants, "--out", str(tmp_path))
    made = [tmp_path / "Made-Up-GGUF" / f"Made-Up-{name}.gguf" for name in ("F32", "Q8_0")]
    found = json.loads(
        run(package, "-c", READ_BACK, str(checkpoint), *map(str, made), str(tmp_path / "Made-Up-FP8-dynamic"))
    )
    assert {item["architecture"] for item in found.values()} == {"MadeUpForCausalLM"}
    assert {name: item["problems"] for name, item in found.items() if item["problems"]} == {}
    metadata = found["Made-Up-F32.gguf"]["metadata"]
    assert metadata["general.architecture"] == "grok"
    assert metadata["grok.vocab_size"] == 320
    assert "grok.rope.dimension_count" not in metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    limits = {"Made-Up": 1e-5, "Made-Up-F32.gguf": 1e-5, "Made-Up-Q8_0.gguf": 0.1, "Made-Up-FP8-dynamic": 0.3}
    assert {name: item["difference"] for name, item in found.items() if item["difference"] > limits[name]} == {}
    assert found["Made-Up-Q8_0.gguf"]["difference"] > 1e-5


def test_no_other_file_names_a_family() -> None:
    """Files of the package in which a real family's class or model type occurs are those that the page names."""
    named = set(re.findall(r"`([a-z0-9_]+(?:/[a-z0-9_]+)+\.py)`", PAGE.read_text()))
    assert {"convert/architectures/families/seed_oss.py", "convert/architectures/__init__.py"} <= named
    assert all((ROOT / name).is_file() for name in named)
    folder = ROOT / "convert" / "architectures" / "families"
    own = {str(path.relative_to(ROOT)) for path in folder.rglob("*.py") if path.name != "__init__.py"}
    # "llama" and "mistral" are also what a program and a company are called: their classes count alone.
    words = [family.hf_architecture for family in FAMILIES]
    words += [family.model_type for family in FAMILIES if family.model_type not in ("llama", "mistral")]
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(words)}|seed-oss)(?![a-z0-9])", re.IGNORECASE)
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text())}
    assert own <= found
    assert sorted(found - own - named - EXAMPLES) == []
