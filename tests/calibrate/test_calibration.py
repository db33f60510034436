"""Calibration: ranges against transformers' own activations, samples, resuming, the file format and its reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import streamquant
from streamquant.calibrate.calibration import STATE_SUFFIX, CalibrationOptions, calibrate
from streamquant.calibrate.importance import ImportanceOptions, write_importance
from streamquant.calibrate.samples import Samples, samples_of_jsonl
from streamquant.cli.app import app
from streamquant.convert.recipes.calibration import AMAX, TOKENS, read_calibration
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.files.safetensors_file import read_header
from streamquant.model.corpus import Corpus, TextFile
from streamquant.model.forward import Setting
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.open import open_original
from streamquant.quant.errors import StreamquantError, UsageError
from tests import synthetic
from tests.convert import test_qwen3_5 as qwen3_5
from tests.small_models import Models

pytestmark = [pytest.mark.xdist_group("validate"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CASE, MIXTURE = "llama3.1", "qwen3-moe"
EVERY_LAYER = CalibrationOptions(state_share=float("inf"))
LENGTHS = np.array([24, 17, 24, 1])


def opened(folder: Path) -> CheckpointVariant:
    variant = open_original(folder)
    assert isinstance(variant, CheckpointVariant)
    return variant


def some_samples(variant: CheckpointVariant, lengths: NDArray[np.int64] = LENGTHS) -> Samples:
    context = int(lengths.max())
    size = len(lengths), context
    tokens = np.random.default_rng(0).integers(0, variant.description.vocab_size, size)
    return Samples(tokens, lengths, context, ("some.txt",))


def ranges_of_transformers(folder: Path, samples: Samples) -> dict[str, float]:
    """The largest magnitudes of inputs, keys and values, all layers in memory, a sample at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    found: dict[str, float] = {}

    def see(name: str, x: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(x.abs().max()))

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _module, arguments: see(name + AMAX, arguments[0]))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            watch(name, module)
    with torch.inference_mode():
        for row, length in zip(samples.tokens, samples.lengths.tolist(), strict=True):
            cache = model(torch.from_numpy(row[None, :length]), use_cache=True).past_key_values
            for number, layer in enumerate(cache.layers):
                see(f"model.layers.{number}.self_attn.k.amax", layer.keys)
                see(f"model.layers.{number}.self_attn.v.amax", layer.values)
    return found


@pytest.mark.parametrize("case", [CASE, "qwen3", "qwen2-yarn"])
def test_ranges_are_those_of_transformers(models: Models, case: str, tmp_path: Path) -> None:
    variant = opened(models.checkpoint(case))
    samples = some_samples(variant)
    run = calibrate(variant, samples, tmp_path / "a.safetensors", CalibrationOptions(imatrix=tmp_path / "a.gguf"))
    found = load_file(tmp_path / "a.safetensors")
    expected = ranges_of_transformers(models.checkpoint(case), samples)
    assert {name: float(found[name][0]) for name in found if name.endswith(".amax")} == expected
    assert all((found[name] == LENGTHS.sum()).all() for name in found if name.endswith(TOKENS))
    assert (run.modules, run.samples, run.tokens, run.resumed_after) == (
        21 if case == CASE else run.modules,
        4,
        66,
        None,
    )


def test_the_importance_matrix_of_the_same_pass(models: Models, tmp_path: Path) -> None:
    variant = opened(models.checkpoint(CASE))
    samples = some_samples(variant, np.array([32, 32]))
    setting = Setting(dtype="f32")
    calibrate(variant, samples, tmp_path / "a.safetensors", CalibrationOptions(setting, imatrix=tmp_path / "a.gguf"))
    corpus = Corpus(samples.tokens, (TextFile(Path("some.txt"), "", 64, 2),), None)
    write_importance(variant, corpus, tmp_path / "b.gguf", ImportanceOptions(setting))
    a, b = read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "b.gguf")
    assert a.entries.keys() == b.entries.keys()
    assert (a.chunk_count, a.datasets) == (b.chunk_count, b.datasets)
    for name, values in a.entries.items():
        assert np.allclose(values, b.entries[name], rtol=1e-5), name
    stored = load_file(tmp_path / "a.safetensors")
    name = "model.layers.1.mlp.down_proj.input.mean_square"
    assert np.allclose(stored[name][0], a.entries["blk.1.ffn_down.weight"], rtol=1e-6)


def test_experts_are_stacked_and_those_without_tokens_are_named(models: Models, tmp_path: Path) -> None:
    variant = opened(models.checkpoint(MIXTURE))
    samples = some_samples(variant, np.array([2]))
    run = calibrate(variant, samples, tmp_path / "a.safetensors")
    assert "fewer than 64 tokens went through" in run.notes[-1]
    assert "(0 tokens)" in run.notes[-1]
    found = read_calibration(tmp_path / "a.safetensors")
    found.check(variant.checkpoint, variant.description)
    assert found.notes() == run.notes[-1:]
    rules = [r for r in variant.description.rules.values() if r.expert and r.hf_name.endswith("down_proj.weight")]
    unseen = next(rule for rule in rules if rule.layer == 0 and found.input_of(rule).tokens == 0)
    ranges = found.amax["model.layers.0.mlp.experts.down_proj"]
    assert ranges[unseen.expert.number] == 0 if unseen.expert else False
    assert found.input_of(unseen).amax == ranges.max() > 0
    # an expert at a time, hidden states on the disk: the same file
    tight = CalibrationOptions(Setting(dtype="bf16", layer_limit=1, memory_limit=0, scratch=tmp_path))
    calibrate(variant, samples, tmp_path / "b.safetensors", tight)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_layers_with_linear_attention_have_no_keys(tmp_path: Path) -> None:
    """Their mask is none either, whatever the lengths of the samples."""
    (tmp_path / "m").mkdir()
    variant = opened(qwen3_5.write_model(tmp_path / "m", qwen3_5.CASES["dense"]))
    calibrate(variant, some_samples(variant), tmp_path / "a.safetensors")
    found = read_calibration(tmp_path / "a.safetensors")
    kinds = variant.config["layer_types"]
    assert list(found.caches) == [at for at, kind in enumerate(kinds) if kind == "full_attention"]
    assert 0 < len(found.caches) < len(kinds)
    found.check(variant.checkpoint, variant.description)


# Interrupted runs

KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
from streamquant.files.listener import Listener
from tests.calibrate.test_calibration import EVERY_LAYER, calibrate, opened, some_samples
folder, out = map(Path, sys.argv[1:])
class Kill(Listener):
    def __init__(self, layers):
        self.left = layers
    def advanced(self, task, amount=1):
        self.left -= amount
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
variant = opened(folder)
samples = some_samples(variant)
for layers in range(variant.description.layer_count + 1):
    place = out / f"{layers}.safetensors"
    child = os.fork()  # no thread was started yet
    if not child:
        calibrate(variant, samples, place, EVERY_LAYER, Kill(layers))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (layers < variant.description.layer_count), status
    child = os.fork()
    if not child:
        run = calibrate(variant, samples, place, EVERY_LAYER)
        os._exit(10 + (run.resumed_after if run.resumed_after is not None else 9))
    print(layers, os.WEXITSTATUS(os.waitpid(child, 0)[1]) - 10)
"""


def test_a_run_that_was_killed_goes_on_behind_its_last_layer(models: Models, tmp_path: Path) -> None:
    folder = models.checkpoint(CASE)
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    variant = opened(folder)
    layers = variant.description.layer_count
    resumed = {int(at): int(after) for at, after in map(str.split, done.stdout.splitlines())}
    assert resumed == {at: min(at, layers - 2) if at < layers else 9 for at in range(layers + 1)}
    calibrate(variant, some_samples(variant), tmp_path / "whole.safetensors", EVERY_LAYER)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert all((tmp_path / f"{at}.safetensors").read_bytes() == whole for at in range(layers + 1))
    assert not list(tmp_path.glob(f"*{STATE_SUFFIX}"))


class Stop(streamquant.Listener):
    """Interrupts a run after some layers."""

    def __init__(self, layers: int = 1) -> None:
        self.left = layers

    def advanced(self, _task: str, amount: int = 1) -> None:
        self.left -= amount
        if not self.left:
            raise KeyboardInterrupt


def test_a_state_that_is_damaged_or_anothers_is_not_continued(models: Models, tmp_path: Path) -> None:
    variant, out = opened(models.checkpoint(CASE)), tmp_path / "a.safetensors"
    state = tmp_path / f"a.safetensors{STATE_SUFFIX}"
    with pytest.raises(KeyboardInterrupt):
        calibrate(variant, some_samples(variant), out, EVERY_LAYER, Stop())
    whole = state.read_bytes()
    with pytest.raises(StreamquantError, match="cannot be continued"):
        calibrate(variant, some_samples(variant, np.array([5, 5])), out)
    tensors, _, _ = read_header(state)
    at = tensors["hidden"].start
    for damage in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:-8]):
        state.write_bytes(damage)
        with pytest.raises(StreamquantError, match=r"cannot be continued|does not end|truncated"):
            calibrate(variant, some_samples(variant), out)
        assert not out.exists()
    state.write_bytes(whole)
    assert calibrate(variant, some_samples(variant), out).resumed_after == 0
    assert calibrate(variant, some_samples(variant), out).already_done
    with pytest.raises(StreamquantError, match="another calibration, or none"):
        calibrate(variant, some_samples(variant, np.array([5, 5])), out)


# The reader


@pytest.fixture(scope="module")
def calibrated(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    variant, out = opened(models.checkpoint(CASE)), tmp_path_factory.mktemp("calibrated") / "a.safetensors"
    calibrate(variant, some_samples(variant), out)
    return out


NAME = "model.layers.1.mlp.up_proj"
KEYS = "model.layers.0.self_attn.k.amax"


def edited(path: Path, out: Path, metadata: dict[str, str], **arrays: NDArray[Any] | None) -> Path:
    """A copy with other arrays (None: without) and other metadata."""
    tensors, old, _ = read_header(path)
    stored = {name: array for name, array in {**load_file(path), **arrays}.items() if array is not None}
    assert tensors.keys() >= arrays.keys() - {"x"}
    save_file(stored, out, {**old, **metadata})
    return out


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({NAME + AMAX: np.array([np.nan], np.float32)}, {}, "up_proj.input.amax: nan"),
        ({NAME + AMAX: np.array([-1], np.float32)}, {}, "up_proj.input.amax: -1"),
        ({NAME + AMAX: np.array([1], np.float16)}, {}, "F16"),
        ({NAME + AMAX: None}, {}, "but no model.layers.1.mlp.up_proj.input.amax"),
        ({NAME + TOKENS: None}, {}, "no model.layers.1.mlp.up_proj.input.tokens"),
        ({NAME + TOKENS: np.array([67])}, {}, "67"),
        ({NAME + TOKENS: np.array([0])}, {}, "of no token"),
        ({NAME + ".input.mean_square": np.full((1, 256), np.inf, np.float32)}, {}, "mean_square: inf"),
        ({KEYS: np.array([np.inf], np.float32)}, {}, "k.amax: inf"),
        ({KEYS.replace(".k.", ".v."): None}, {}, "no model.layers.0.self_attn.v.amax"),
        ({}, {"version": "2"}, "version '2'"),
        ({}, {"format": "pt"}, "format 'pt'"),
        ({}, {"samples": "-3"}, "samples '-3'"),
        ({}, {"texts": "{"}, "texts"),
        ({}, {"fingerprint": ""}, "no fingerprint"),
    ],
)
def test_a_broken_file_is_refused(
    calibrated: Path, arrays: dict[str, Any], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    broken = edited(calibrated, tmp_path / "b.safetensors", metadata, **arrays)
    with pytest.raises(StreamquantError, match="not a readable calibration file") as caught:
        read_calibration(broken)
    assert message in str(caught.value)


def test_a_file_of_another_model_is_refused(calibrated: Path, models: Models, tmp_path: Path) -> None:
    right, found = opened(models.checkpoint(CASE)), read_calibration(calibrated)
    found.check(right.checkpoint, right.description)
    one_shard = opened(models.checkpoint(CASE, shards=1))
    found.check(one_shard.checkpoint, one_shard.description)
    others = {
        "seed": (models.checkpoint(CASE, seed=1), "fingerprint"),
        "rope": (models.checkpoint(CASE, rope="linear"), "fingerprint"),
        "layers": (models.checkpoint(CASE, num_hidden_layers=4), "no model.layers.3"),
        "fewer": (models.checkpoint(CASE, num_hidden_layers=2), "which this model does not have"),
    }
    for folder, message in others.values():
        other = opened(folder)
        with pytest.raises(StreamquantError, match="calibration of another model") as caught:
            found.check(other.checkpoint, other.description)
        assert message in str(caught.value)


# Samples


def test_lines_of_jsonl_are_samples(models: Models, tmp_path: Path) -> None:
    folder = models.checkpoint(CASE)
    asked: list[Any] = []

    def render(conversations: Any) -> list[Any]:
        asked.extend(conversations)
        return [[7, 8, 9] for _ in conversations]

    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}], "id": 3}
    path.write_text("\n".join(map(json.dumps, [chat, {"text": "some words of text"}, {"text": "never read"}])) + "\n\n")
    samples = samples_of_jsonl(path, folder, 2, 4, render)
    assert asked == [{"messages": chat["messages"], "tools": chat["tools"]}]
    assert samples.lengths.tolist() == [3, 4]
    assert samples.tokens[0].tolist() == [7, 8, 9, 0]
    assert (samples.texts, samples.notes, samples.total) == (("a.jsonl",), (), 7)
    assert samples_of_jsonl(path, folder, 9, 4, render).notes == (
        "3 samples, of 9 that were asked for: there are no more",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"}', "a line is no sample"),
        ('{"messages": []}', "a line is no sample"),
        ('{"messages": [{"role": "user"}], "tools": 3}', "a line is no sample"),
        ("[1]", "a line is no sample"),
        ("{", "JSON"),
        ('{"text": ""}', "a sample without a token"),
    ],
)
def test_lines_that_are_none_are_named(models: Models, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' + line + "\n")
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(models.checkpoint(CASE) / "tokenizer.json"))
    backend.post_processor = None  # no BOS: an empty text has no token
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(StreamquantError, match=message) as caught:
        samples_of_jsonl(path, tmp_path, 9, 4, lambda chats: [[1] for _ in chats])
    assert "a.jsonl, line 2" in str(caught.value)


def test_the_command(models: Models, tmp_path: Path) -> None:
    """The chat template runs in a process of its own, over whole conversations."""
    folder, out = models.checkpoint(CASE), tmp_path / "a.safetensors"
    chat = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    command = ["calibrate", str(folder), "--out", str(out)]
    runner = CliRunner()
    assert runner.invoke(app, command, catch_exceptions=True).exit_code != 0
    for kinds in ([], ["--chat", str(chat), "--text", str(chat)]):
        with pytest.raises(UsageError, match="samples of one kind"):
            runner.invoke(app, [*command, *kinds], catch_exceptions=False)
    result = runner.invoke(app, [*command, "--chat", str(chat), "--samples", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)
    assert f"21 modules over 1 samples, {len(ids)} tokens, in" in result.output
    assert read_calibration(out).record.tokens == len(ids)
    with pytest.raises(UsageError, match="of the checkpoint that is converted"):
        streamquant.calibrate(models.gguf(CASE, "Q8_0"), tmp_path / "b.safetensors", texts=[chat])


# Memory

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from tests.calibrate.test_calibration import EVERY_LAYER, calibrate, opened, some_samples
torch.set_num_threads(1)
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
out = Path(sys.argv[3])
small = opened(Path(sys.argv[2]))
calibrate(small, some_samples(small), out / "small.safetensors", EVERY_LAYER)  # code and buffers of libraries
limit = memory("VmData") + (192 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = memory("VmRSS")
large = opened(Path(sys.argv[1]))
calibrate(large, some_samples(large), out / f"{large.label}.safetensors", EVERY_LAYER)
print(before, memory("VmHWM"))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory on Linux alone")
def test_memory_does_not_grow_with_depth_and_the_model_does_not_fit(tmp_path: Path) -> None:
    """16 layers of 28 MB in BF16, 448 MB, where 192 MiB may be allocated; 4 layers take as much."""
    small = synthetic.write_checkpoint(tmp_path / "small")
    peaks = {}
    for layers in (4, 16):
        size = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": layers}
        size |= {"num_attention_heads": 8, "num_key_value_heads": 4}
        folder = synthetic.write_checkpoint(tmp_path / str(layers), size=size)
        command = [sys.executable, "-c", MEASURE, str(folder), str(small), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        _, peaks[layers] = map(int, done.stdout.split())
    assert (tmp_path / "16" / "model.safetensors").stat().st_size > 400 << 20
    assert peaks[16] <= 1.1 * peaks[4]


def test_the_cost_of_the_state_is_bounded(models: Models, tmp_path: Path) -> None:
    """What writing costs is known after the first state; where its share would be too large, no other follows."""
    variant, state = opened(models.checkpoint(CASE)), tmp_path / f"a.safetensors{STATE_SUFFIX}"
    for share, last in ((1e-9, "0"), (float("inf"), "1")):
        options = CalibrationOptions(state_share=share)
        with pytest.raises(KeyboardInterrupt):
            calibrate(variant, some_samples(variant), tmp_path / "a.safetensors", options, Stop(2))
        assert read_header(state)[1]["layer"] == last
        state.unlink()
