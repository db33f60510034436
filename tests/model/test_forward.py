"""The streamed pass against transformers' resident forward, on every family, variant and way of computing."""

import dataclasses
import importlib.metadata
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamquant.files.listener import Listener
from streamquant.model.forward import (
    DType,
    Lane,
    Setting,
    all_logits,
    causal_mask,
    count_layers,
    default_setting,
    run_layers,
    scored_positions,
)
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from tests import synthetic
from tests.peers import ROOT
from tests.small_models import CASES, LLAMA, MISTRAL, QWEN2, Models, edit_gguf

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(900)]

F32 = Setting(dtype="f32", batch_tokens=64)
BF16 = Setting(dtype="bf16", batch_tokens=64)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers shows progress and reports on loading, to stderr."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    yield
    transformers.utils.logging.set_verbosity_warning()


def some_tokens(vocabulary: int, chunks: int = 3, context: int = 48) -> Any:
    return np.random.default_rng(chunks).integers(0, vocabulary, (chunks, context))


def resident(folder: Path, tokens: Any, dtype: str, **options: Any) -> torch.Tensor:
    """float32[chunks, context, vocabulary] of transformers, all layers in memory, the head in float32.

    Experts run one by one, as its modeling file has it: its default, a grouped product, rounds otherwise.
    """
    from transformers import AutoModelForCausalLM

    options = {"experts_implementation": "eager", **options}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    with torch.inference_mode():
        if dtype == "float32":
            return model(torch.from_numpy(tokens)).logits.float()
        head, model.lm_head = model.lm_head.weight.float(), torch.nn.Identity()
        return torch.nn.functional.linear(model(torch.from_numpy(tokens)).logits.float(), head)


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in parts of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_streamed_logits_are_the_resident_ones(models: Models, case: str) -> None:
    folder = models.checkpoint(case)
    tokens = some_tokens(vocabulary(folder))
    expected = resident(folder, tokens, "float32")
    found = all_logits(open_variant(folder), tokens, dataclasses.replace(F32, batch_tokens=4096))
    assert torch.equal(found, expected)
    one_by_one = all_logits(open_variant(folder), tokens, F32)
    assert largest_difference(one_by_one, expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "name"), [("f32", "float32"), pytest.param("bf16", "bfloat16", marks=pytest.mark.long)]
)
def test_smollm2(smollm2: Path, dtype: DType, name: str) -> None:
    tokens = some_tokens(49152, 1, 48)
    found = all_logits(open_variant(smollm2), tokens, Setting(dtype=dtype))
    assert largest_difference(found, resident(smollm2, tokens, name)) < 1e-6


def test_the_tiny_real_llama(data: Path) -> None:
    folder = data / "models" / "stories260K-bf16"
    tokens = some_tokens(512, 4, 128)
    found = all_logits(open_variant(folder), tokens, dataclasses.replace(F32, batch_tokens=4096))
    assert torch.equal(found, resident(folder, tokens, "float32"))


def test_a_wrong_weight_would_show(models: Models, tmp_path: Path) -> None:
    """The proof that the comparison can fail: q's rows in llama.cpp's order."""
    source = models.gguf("llama3.1", "F32")
    rows = read_rows(source, "blk.1.attn_q.weight")
    wrong = edit_gguf(source, tmp_path / "wrong-F32.gguf", tensors={"blk.1.attn_q.weight": lambda _raw: rows[::-1]})
    folder = models.checkpoint("llama3.1")
    tokens = some_tokens(vocabulary(folder))
    expected = resident(folder, tokens, "float32")
    assert largest_difference(all_logits(open_variant(source), tokens, F32), expected) < 1e-5
    assert largest_difference(all_logits(open_variant(wrong), tokens, F32), expected) > 1e-2


def read_rows(path: Path, name: str) -> Any:
    import gguf

    return next(np.array(t.data) for t in gguf.GGUFReader(path).tensors if t.name == name)


# --- sliding windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        (MISTRAL, {"sliding_window": 7}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(tmp_path: Path, architecture: str, keys: dict[str, object]) -> None:
    folder = synthetic.write_checkpoint(tmp_path / "m", architecture=architecture, **keys)  # type: ignore[arg-type]
    tokens = some_tokens(512)
    expected = resident(folder, tokens, "float32")
    assert largest_difference(all_logits(open_variant(folder), tokens, F32), expected) < 1e-5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None, "use_sliding_window": False}))
    assert largest_difference(all_logits(open_variant(folder), tokens, F32), expected) > 1e-3


def test_the_mask_of_a_window() -> None:
    config = type("Config", (), {"sliding_window": 2, "layer_types": ["full_attention", "sliding_attention"]})()
    positions = torch.arange(4)[None]
    assert causal_mask(config, 0, positions) is None
    mask = causal_mask(config, 1, positions)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


# --- FP8 ------------------------------------------------------------------------------------------------------------

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_as_transformers_runs_it(tmp_path: Path, scheme: str, dtype: str) -> None:
    from streamquant.convert.conversion import convert
    from streamquant.convert.options import RunOptions
    from streamquant.convert.plan.planner import make_plan
    from streamquant.convert.recipes.recipe import parse_variants
    from streamquant.convert.source.checkpoint import open_checkpoint

    source = synthetic.write_checkpoint(tmp_path / "Wide", architecture=LLAMA, size=WIDE)
    convert(make_plan(open_checkpoint(source), parse_variants([scheme])), tmp_path / "out", RunOptions(jobs=2))
    (folder,) = (tmp_path / "out").iterdir()
    tokens = some_tokens(512)
    variant = open_variant(folder)
    setting = dataclasses.replace(F32 if dtype == "float32" else BF16, batch_tokens=4096)
    found = all_logits(variant, tokens, setting)
    assert largest_difference(found, resident(folder, tokens, dtype)) < 1e-6
    assert not variant.problems
    plain = all_logits(variant, tokens, dataclasses.replace(setting, weights_only=True))
    assert 1e-4 < largest_difference(plain, found) < 0.3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def test_integers_and_mx_as_transformers_runs_them(tmp_path: Path, dtype: str) -> None:
    """Of each scheme the logits of transformers, which decompresses the weights and quantizes the inputs.

    MX and NVFP4 weights of a BF16 source become BF16 there, whatever the dtype of the model, so that F32 does not run.
    """
    from streamquant.convert.conversion import convert
    from streamquant.convert.options import RunOptions
    from streamquant.convert.plan.planner import make_plan
    from streamquant.convert.recipes.recipe import RECIPES, parse_variants
    from streamquant.convert.source.checkpoint import open_checkpoint

    source = synthetic.write_checkpoint(tmp_path / "Wide", architecture=LLAMA, size=WIDE)
    schemes = ["w4a16", "w8a16", "w8a8"]
    # With compressed-tensors 0.20, which packs zero points as 0.19 does, transformers 5.24 makes room for unpacked ones
    # and refuses every such folder, the library's own too.
    schemes += ["w4a16-asym-g32"] if importlib.metadata.version("compressed-tensors").startswith("0.19.") else []
    schemes += ["mxfp4", "mxfp4a16", "mxfp8", "nvfp4a16"] if dtype == "bfloat16" else []
    convert(make_plan(open_checkpoint(source), parse_variants(schemes)), tmp_path / "out", RunOptions(jobs=2))
    tokens = some_tokens(512)
    setting = dataclasses.replace(F32 if dtype == "float32" else BF16, batch_tokens=4096)
    for scheme in schemes:
        folder = tmp_path / "out" / f"Wide-{RECIPES[scheme].label}"
        variant = open_variant(folder)
        found = all_logits(variant, tokens, setting)
        assert largest_difference(found, resident(folder, tokens, dtype)) < 1e-6, scheme
        assert not variant.problems
        plain = all_logits(variant, tokens, dataclasses.replace(setting, weights_only=True))
        assert (largest_difference(plain, found) > 1e-4) == (variant.activations() is not None), scheme


@pytest.mark.long
def test_smollm2_in_fp8_as_transformers_runs_it(smollm2_variants: Path) -> None:
    folder = smollm2_variants / "SmolLM2-135M-Instruct-FP8-dynamic"
    tokens = some_tokens(49152, 1, 64)
    found = all_logits(open_variant(folder), tokens, Setting(dtype="bf16"))
    assert largest_difference(found, resident(folder, tokens, "bfloat16")) < 1e-6


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_lossless_gguf_computes_what_the_original_does(models: Models, case: str) -> None:
    """Names, row order, hyperparameters and rotary frequencies all come from the file."""
    folder = models.checkpoint(case)
    tokens = some_tokens(vocabulary(folder))
    expected = all_logits(open_variant(folder), tokens, F32)
    found = all_logits(open_variant(models.gguf(case, "F32")), tokens, F32)
    # yarn: llama.cpp rounds the frequencies in another order
    assert largest_difference(found, expected) < 2e-5


@pytest.mark.long
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_smollm2_gguf_as_transformers_loads_it(smollm2_variants: Path, kind: str) -> None:
    folder = smollm2_variants / "SmolLM2-135M-Instruct-GGUF"
    name = f"SmolLM2-135M-Instruct-{kind}.gguf"
    tokens = some_tokens(49152, 1, 64)
    expected = resident(folder, tokens, "float32", gguf_file=name)
    weights_only = dataclasses.replace(F32, weights_only=True)
    assert largest_difference(all_logits(open_variant(folder / name), tokens, weights_only), expected) < 1e-5


def test_rope_freqs_left_out_changes_the_logits(models: Models, tmp_path: Path) -> None:
    """As llama.cpp would compute such a file."""
    source = models.gguf("llama3.1", "F32")
    without = edit_gguf(source, tmp_path / "without-F32.gguf", tensors={"rope_freqs.weight": None})
    folder = models.checkpoint("llama3.1", rope="default")
    tokens = some_tokens(vocabulary(folder), context=96)
    unscaled = all_logits(open_variant(folder), tokens, F32)
    assert largest_difference(all_logits(open_variant(without), tokens, F32), unscaled) < 1e-5
    assert largest_difference(all_logits(open_variant(source), tokens, F32), unscaled) > 1e-4


# --- ways of computing ----------------------------------------------------------------------------------------------


class Counting(Listener):
    """Counts the steps of each task."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()

    def advanced(self, task: str, amount: int = 1) -> None:
        self.steps[task] += amount


def test_lanes_in_lock_step_are_as_alone(models: Models) -> None:
    paths = [models.checkpoint("llama3.1"), models.gguf("llama3.1", "Q8_0"), models.fp8("llama3.1")]
    tokens = some_tokens(vocabulary(paths[0]))
    lanes = [Lane(open_variant(path)) for path in paths]
    seen: list[tuple[int, int]] = []
    for at, lane in enumerate(lanes):
        lane.on_layer = lambda layer, _hidden, at=at: seen.append((layer, at))
    listener = Counting()
    run_layers(lanes, tokens, F32, listener)
    assert listener.steps.keys() == {"layers"}
    assert listener.steps["layers"] == count_layers(lanes) == sum(layer >= 0 for layer, _ in seen)
    assert seen == [(layer, number) for layer in range(-1, 3) for number in range(3)]
    for lane, path in zip(lanes, paths, strict=True):
        alone = Lane(open_variant(path))
        run_layers([alone], tokens, F32)
        assert lane.hidden is not None
        assert alone.hidden is not None
        assert torch.equal(lane.hidden, alone.hidden)
        assert lane.bytes_read == alone.bytes_read > 0


def test_hidden_states_on_disk(models: Models, tmp_path: Path) -> None:
    folder = models.checkpoint("qwen3")
    tokens = some_tokens(vocabulary(folder))
    expected = all_logits(open_variant(folder), tokens, F32)
    on_disk = dataclasses.replace(F32, memory_limit=0, scratch=tmp_path / "scratch")
    assert torch.equal(all_logits(open_variant(folder), tokens, on_disk), expected)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_token_outside_the_vocabulary(models: Models) -> None:
    folder = models.checkpoint("qwen3")
    with pytest.raises(StreamquantError, match="not in the vocabulary"):
        all_logits(open_variant(folder), np.array([[1, 10**6]]), F32)
    with pytest.raises(StreamquantError, match="no tokens"):
        all_logits(open_variant(folder), np.zeros((0, 4), np.int64), F32)


def test_default_setting() -> None:
    assert default_setting("cpu") == Setting(device="cpu", dtype="f32")
    if not torch.cuda.is_available():
        assert default_setting("auto").device == "cpu"
        with pytest.raises(UsageError, match="no such device"):
            default_setting("cuda")


def test_scored_positions() -> None:
    assert scored_positions(512) == (256, 511)
    assert scored_positions(33) == (16, 32)


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import numpy as np, torch, transformers
from streamquant.model.forward import DType, Lane, Setting, run_layers
from streamquant.model.variants.open import open_variant
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024
torch.set_num_threads(1)
tokens = np.random.default_rng(0).integers(0, 512, (2, 64))
lanes = [Lane(open_variant(Path(sys.argv[1]))) for _ in range(2)]
run_layers([Lane(open_variant(Path(sys.argv[2])))], tokens, Setting())  # code and buffers of libraries
before = memory("VmRSS")
run_layers(lanes, tokens, Setting())
print(before, memory("VmHWM"))
"""


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Two models of 4 and of 16 layers of 14 MiB in float32: 112 MiB and 448 MiB if they were resident."""
    peaks = {}
    small = synthetic.write_checkpoint(tmp_path / "small")
    for layers in (4, 16):
        size = {**WIDE, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": layers}
        folder = synthetic.write_checkpoint(tmp_path / str(layers), size=size)
        command = [sys.executable, "-c", MEASURE, str(folder), str(small)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        before, peak = map(int, done.stdout.split())
        peaks[layers] = peak
        assert peak - before < 110, "two layers and their temporaries"
    assert peaks[16] <= 1.1 * peaks[4]


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch, transformers
from streamquant.model.forward import Lane, Setting, run_layers
from streamquant.model.variants.open import open_variant
torch.set_num_threads(1)
tokens = np.random.default_rng(0).integers(0, 512, (2, 64))
run_layers([Lane(open_variant(Path(sys.argv[2])))], tokens, Setting())  # code and buffers of libraries
lines = Path("/proc/self/status").read_text().splitlines()
data = next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + (160 << 20), data + (160 << 20)))
lane = Lane(open_variant(Path(sys.argv[1])))
run_layers([lane], tokens, Setting())
print("streamed", bool(torch.isfinite(lane.hidden).all()))
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    print("resident")
except (MemoryError, RuntimeError) as error:
    print("refused", type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory on Linux alone")
def test_a_model_larger_than_a_memory_limit_runs(tmp_path: Path) -> None:
    """448 MiB of float32 weights where 160 MiB may be allocated; loaded as a whole, the same model is refused."""
    small = synthetic.write_checkpoint(tmp_path / "small")
    size = {**WIDE, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 16}
    folder = synthetic.write_checkpoint(tmp_path / "large", size=size)
    command = [sys.executable, "-c", LIMITED, str(folder), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first == "streamed True"
    assert second.startswith("refused"), second
