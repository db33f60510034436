"""Layers whose experts are read one at a time: the same bits, each expert seen once, and memory that stays flat."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamquant.model.forward import Lane, Setting, run_layers
from streamquant.model.variants.open import open_variant
from tests import synthetic
from tests.peers import ROOT
from tests.small_models import Models

WHOLE = Setting(dtype="f32", batch_tokens=64, layer_limit=1 << 40)
APART = dataclasses.replace(WHOLE, layer_limit=0)


def some_tokens(chunks: int = 4, context: int = 32) -> Any:
    return np.random.default_rng(chunks).integers(0, 300, (chunks, context))


@dataclasses.dataclass
class Seen:
    """What the observers of a lane were shown."""

    inputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Name of a linear layer -> its inputs, [tokens, n]."""
    weights: dict[str, int] = dataclasses.field(default_factory=dict)
    """Name of a tensor -> rows."""

    def lane(self, path: Path) -> Lane:
        return Lane(open_variant(path), on_input=self.see_input, on_weight=self.see_weight)

    def see_input(self, name: str, x: torch.Tensor) -> None:
        before = [self.inputs[name]] if name in self.inputs else []
        self.inputs[name] = torch.cat([*before, x.reshape(-1, x.shape[-1])])

    def see_weight(self, name: str, _first: int, rows: torch.Tensor) -> None:
        self.weights[name] = self.weights.get(name, 0) + len(rows)


def run(path: Path, setting: Setting) -> tuple[torch.Tensor, Seen, int]:
    """Hidden states, what observers saw, bytes read."""
    seen = Seen()
    lane = seen.lane(path)
    run_layers([lane], some_tokens(), setting)
    assert lane.hidden is not None
    return lane.hidden, seen, lane.bytes_read


def layer_bytes(path: Path) -> int:
    """Of the weights of layer 0 in float32."""
    return 4 * sum(math.prod(rule.shape) for rule in open_variant(path).layer_rules(0))


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("form", ["checkpoint", "fp8", "gguf"])
def test_the_same_bits_and_every_expert_once(models: Models, case: str, form: str) -> None:
    """Two batches, in a share each, or in one share. FP8 quantizes what goes into the experts."""
    path = models.gguf(case, "Q8_0") if form == "gguf" else getattr(models, form)(case)
    hidden, seen, nbytes = run(path, WHOLE)
    one_share = dataclasses.replace(APART, layer_limit=layer_bytes(path) - 1)
    for setting in (APART, one_share):
        apart, seen_apart, nbytes_apart = run(path, setting)
        assert torch.equal(hidden, apart)
        assert seen.weights == seen_apart.weights
        assert seen.inputs.keys() == seen_apart.inputs.keys()
        assert all(torch.equal(x, seen_apart.inputs[name]) for name, x in seen.inputs.items())
        # What a token of the second share goes through is read again.
        assert (nbytes == nbytes_apart) if setting is one_share else (nbytes < nbytes_apart <= 2 * nbytes)


def test_weights_of_experts_that_no_token_reaches_are_seen(models: Models) -> None:
    """Two tokens reach at most four of five experts."""
    path = models.checkpoint("qwen3-moe")
    seen, whole = Seen(), Seen()
    for watched, setting in ((seen, APART), (whole, WHOLE)):
        run_layers([watched.lane(path)], some_tokens(1, 2), setting)
    experts = {name for name in open_variant(path).description.rules if ".experts." in name}
    assert experts <= seen.weights.keys()
    assert seen.inputs.keys() == whole.inputs.keys()
    assert len([name for name in seen.inputs if ".experts." in name]) < len(experts)


def test_half_precision(models: Models) -> None:
    path = models.checkpoint("qwen3-moe")
    settings = [dataclasses.replace(setting, dtype="bf16") for setting in (WHOLE, APART)]
    whole, apart = (run(path, setting)[0] for setting in settings)
    assert torch.equal(whole, apart)


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np, torch, transformers
from streamquant.model.forward import Lane, Setting, run_layers
from streamquant.model.variants.open import open_variant
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024
torch.set_num_threads(1)
tokens = np.random.default_rng(0).integers(0, 512, (2, 64))
small, *large = map(Path, sys.argv[1:])
run_layers([Lane(open_variant(small))], tokens, Setting(layer_limit=0))  # code and buffers of libraries
limit = (memory("VmData") + 80) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for path in large:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory("VmRSS")
    lane = Lane(open_variant(path))
    run_layers([lane], tokens, Setting(layer_limit=4 << 20))
    assert bool(torch.isfinite(lane.hidden).all())
    print(memory("VmHWM") - before)
    del lane
try:
    run_layers([Lane(open_variant(path))], tokens, Setting(layer_limit=1 << 40))
except (MemoryError, RuntimeError) as error:
    print("refused:", type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of memory is Linux's")
def test_memory_is_flat_in_layers_and_experts(tmp_path: Path) -> None:
    """64 experts of 0.75 MiB in float32: a layer has 48 MiB, which the whole pass does not take, for 2 or 6 layers.

    80 MiB may be allocated: two whole layers would not fit.
    """
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    folders = [
        synthetic.write_checkpoint(
            tmp_path / f"{experts}-{layers}",
            architecture="Qwen3MoeForCausalLM",
            size={**sizes, "num_hidden_layers": layers},
            num_experts=experts,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
        )
        for experts, layers in ((4, 1), (64, 2), (64, 6))
    ]
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *peaks, refused = done.stdout.splitlines()
    assert refused.startswith("refused"), "the whole pass needs more than may be allocated"
    two, six = map(int, peaks)
    assert two < 40, "MiB: less than one layer"
    assert six < 40, "MiB"
