import importlib.util
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.gguf_file import read_header, read_raw_metadata
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.agreement import Thresholds, engine_agreement, prompts_from
from streamquant.validate.engines.engine import EngineFacts, TemplateRequest, TopLogprobs, kind_of
from streamquant.validate.engines.process import EngineProcess, LoadOptions, TimeLimits
from streamquant.validate.engines.vocabulary_gguf import write_vocabulary_gguf
from tests.conftest import Shelf
from tests.peers import requires_llama_cpp
from tests.small_models import Models
from tests.validate.engine_fixtures import Model, with_keys

LENGTHS = (2, 8, 32, 64, 64)
ROPE_LENGTHS = (32, 200, 300)


@dataclass(frozen=True)
class Reference:
    """Prompts, and transformers' float32[prompts, vocabulary] log-probabilities of what follows."""

    prompts: list[list[int]]
    logits: NDArray[np.float32]


def reference_of(folder: Path, text: str, lengths: Sequence[int]) -> Reference:
    with EngineProcess(folder, options=LoadOptions(dtype="float32", threads=2)) as engine:
        (ids,) = engine.tokenize([text], add_special=False, parse_special=False)
        prompts = prompts_from(ids, lengths)
        size = engine.facts.vocabulary
        logits = np.zeros((len(prompts), size), np.float32)
        for row, best in zip(logits, engine.next_token_logprobs(prompts, size), strict=True):
            row[list(best.ids)] = best.logprobs
    assert np.allclose(np.exp(logits).sum(1), 1, atol=1e-3)
    return Reference(prompts, logits)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path, data: Path) -> Reference:
    return reference_of(smollm2, (data / "text" / "wiki.test.raw").read_text()[:20000], LENGTHS)


def gguf_of(variants: Path, name: str) -> Path:
    return next(variants.glob(f"*-GGUF/*-{name}.gguf"))


# Processes


def test_the_engine_for_a_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine for this"):
        kind_of(tmp_path)
    with pytest.raises(UsageError, match="no engine for this"):
        EngineProcess(tmp_path / "missing.gguf")
    (tmp_path / "config.json").touch()
    assert kind_of(tmp_path) == "transformers"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(UsageError, match="vllm is not installed") as caught:
        EngineProcess(tmp_path, kind="vllm", tokenizer_only=True)
    assert "pip install vllm" in str(caught.value)


@requires_llama_cpp
def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "x.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StreamquantError, match="the engine") as caught:
        EngineProcess(broken)
    assert str(broken) in str(caught.value)
    with pytest.raises(StreamquantError, match="not a readable GGUF file"):
        EngineProcess(broken, tokenizer_only=True)


@requires_llama_cpp
def test_an_engine_that_dies_or_hangs_is_an_error(hermes_14b: Model, tmp_path: Path) -> None:
    loop = "{% for a in range(99999) %}"
    endless = f"{loop}{loop}{loop}" + 3 * "{% endfor %}"
    keys = {"tokenizer.chat_template": GGUFValue(endless, GGUFValueType.STRING)}
    broken = with_keys(hermes_14b.gguf, tmp_path / "x.gguf", keys)
    with pytest.raises(StreamquantError, match="did not answer load in time") as caught:
        EngineProcess(broken, tokenizer_only=True, limits=TimeLimits(load=4))
    assert "endless loop" in str(caught.value)
    with EngineProcess(hermes_14b.gguf, tokenizer_only=True) as engine:
        pid = engine._child.pid
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(StreamquantError, match="ended during tokenize") as caught:
            engine.tokenize(["a"], add_special=False, parse_special=False)
        assert "SIGKILL" in str(caught.value)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.long
def test_a_template_cannot_take_all_time_or_leave_the_sandbox(hermes_14b: Model) -> None:
    asked = [TemplateRequest(({"role": "user", "content": "x"},))]
    with EngineProcess(hermes_14b.source, tokenizer_only=True, limits=TimeLimits(request=60)) as engine:
        outside = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        assert "SecurityError" in (engine.render(outside, asked)[0].error or "")
        huge = "{% set x = namespace(s='a') %}{% for i in range(40) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}"
        assert "MemoryError" in (engine.render(huge, asked)[0].error or "")
        engine.limits = TimeLimits(request=2)
        loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(StreamquantError, match="did not answer render in time"):
            engine.render(loop, asked)


# The vocabulary alone


def test_the_stand_in_has_the_keys_of_the_file(hermes_llama: Model, tmp_path: Path) -> None:
    stand_in = write_vocabulary_gguf(hermes_llama.gguf, tmp_path / "x.gguf")
    (_, ours), (_, theirs) = read_raw_metadata(stand_in), read_raw_metadata(hermes_llama.gguf)
    own = {key for key in theirs if key.startswith("tokenizer.")}
    assert len(own) > 8
    assert all(ours[key] == theirs[key] for key in own)
    assert stand_in.stat().st_blocks * 512 < hermes_llama.gguf.stat().st_size / 2
    assert len(read_header(stand_in).tensors) == 11
    later = with_keys(hermes_llama.gguf, tmp_path / "y.gguf", {"tokenizer.ggml.tokens": None})
    with pytest.raises(StreamquantError, match="no vocabulary in the file"):
        write_vocabulary_gguf(later, tmp_path / "z.gguf")


@requires_llama_cpp
def test_facts(llama_gguf: EngineProcess, qwen_gguf: EngineProcess) -> None:
    assert llama_gguf.facts.kind == "llama.cpp"
    assert "xllamacpp" in llama_gguf.facts.version
    assert (llama_gguf.facts.bos, llama_gguf.facts.adds_bos) == ("<|begin_of_text|>", True)
    assert llama_gguf.facts.vocabulary == 128256
    assert not qwen_gguf.facts.adds_bos
    assert json.loads(json.dumps(asdict(llama_gguf.facts)))["eos"] == "<|eot_id|>"


# Agreement


class Fixed:
    """An engine with given next-token log-probabilities."""

    facts = EngineFacts("llama.cpp", "0", "m", None, None, False, 4)

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        self.rows = rows

    def next_token_logprobs(self, prompts: Sequence[Sequence[int]], top: int) -> list[TopLogprobs]:
        assert len(prompts) == len(self.rows)
        best = [sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top] for row in self.rows]
        return [TopLogprobs(tuple(ids), tuple(row[at] for at in ids)) for ids, row in zip(best, self.rows, strict=True)]


def agreement(rows: list[list[float]], logits: NDArray[np.float64], top: int = 4) -> object:
    return engine_agreement(Fixed(rows), [[1]] * len(rows), logits, top=top)  # type: ignore[arg-type]  # a part of one


def test_the_statistics_of_agreement() -> None:
    p, q = np.array([0.7, 0.2, 0.06, 0.04]), np.array([0.5, 0.3, 0.1, 0.1])
    found = engine_agreement(Fixed([list(np.log(p))]), [[1, 2]], np.log(q)[None] + 7, top=4)  # type: ignore[arg-type]
    assert math.isclose(found.mean_kld, float((p * np.log(p / q)).sum()), rel_tol=1e-9)
    coarse = engine_agreement(Fixed([list(np.log(p))]), [[1, 2]], lambda _: np.log(q)[None], top=1)  # type: ignore[arg-type]
    assert math.isclose(coarse.mean_kld, 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5), rel_tol=1e-9)
    assert coarse.mean_kld < found.mean_kld
    assert found.prompts[0].tokens == 2
    assert found.same_top == 1
    equal = engine_agreement(Fixed([list(np.log(p))]), [[1]], np.log(p)[None], top=4)  # type: ignore[arg-type]
    assert equal.agrees
    assert (round(equal.mean_kld, 12), round(equal.median_error, 12)) == (0, 0)
    other = engine_agreement(Fixed([list(np.log(p))]), [[1]], np.log(p[::-1])[None], top=4)  # type: ignore[arg-type]
    assert len(other.problems) == 4
    nan = engine_agreement(Fixed([list(np.log(p))]), [[1]], np.full((1, 4), np.nan), top=4)  # type: ignore[arg-type]
    assert not nan.agrees


def test_logits_that_cannot_belong_to_the_prompts() -> None:
    for shape in ((2, 4), (1, 3), (4,)):
        with pytest.raises(StreamquantError, match="do not fit the prompts"):
            agreement([[0.0, -1.0, -2.0, -3.0]], np.zeros(shape))
    with pytest.raises(StreamquantError, match="no prompts"):
        agreement([], np.zeros((0, 4)))
    with pytest.raises(StreamquantError, match="text is too short"):
        prompts_from(range(10), (2, 8))


@requires_llama_cpp
def test_healthy_files_agree(smollm2_variants: Path, smollm2_reference: Reference) -> None:
    for name, worst in (("BF16", 0.002), ("Q8_0", 0.02)):
        with EngineProcess(gguf_of(smollm2_variants, name), options=LoadOptions(threads=1, context=256)) as engine:
            report = engine_agreement(engine, smollm2_reference.prompts, smollm2_reference.logits)
        assert report.problems == ()
        assert abs(report.mean_kld) < worst
        assert report.same_top == 1
        assert [prompt.tokens for prompt in report.prompts] == list(LENGTHS)
    assert json.loads(json.dumps(asdict(report)))["top"] == 64


def edited(path: Path, target: Path, name: str, edit: object) -> Path:
    """A copy of a BF16 GGUF with every tensor whose name ends so edited: uint16[rows, columns] -> the same shape."""
    content = bytearray(path.read_bytes())
    found = [tensor for tensor in read_header(path).tensors if tensor.name.endswith(name)]
    assert found
    for tensor in found:
        dtype = np.uint16 if tensor.stored_as == "BF16" else np.float32
        rows = np.frombuffer(bytes(content[tensor.start : tensor.stop]), dtype).reshape(tensor.shape)
        content[tensor.start : tensor.stop] = edit(rows).tobytes()  # type: ignore[operator]  # a plain function
    target.write_bytes(content)
    return target


def not_permuted(rows: NDArray[np.uint16], heads: int = 3) -> NDArray[np.uint16]:
    """Undo what the converter did to q or k: the order that a reader without the permutation would write."""
    return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


@requires_llama_cpp
def test_rows_in_the_wrong_order_are_found(
    smollm2_variants: Path, smollm2_reference: Reference, tmp_path: Path
) -> None:
    broken = edited(gguf_of(smollm2_variants, "BF16"), tmp_path / "x.gguf", "attn_k.weight", not_permuted)
    with EngineProcess(broken, options=LoadOptions(threads=1, context=256)) as engine:
        report = engine_agreement(engine, smollm2_reference.prompts, smollm2_reference.logits)
    assert any("row order, rope or scales" in problem for problem in report.problems)
    assert report.mean_kld > 10 * Thresholds().mean_kld
    assert report.median_error > 2 * Thresholds().median_error


@pytest.mark.long
@requires_llama_cpp
def test_a_rope_scaling_that_is_left_out_is_found(smollm2: Path, shelf: Shelf, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(smollm2, tmp_path / "Scaled")
    config = json.loads((smollm2 / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_parameters"] |= {**scaling, "original_max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    convert(make_plan(open_checkpoint(folder), parse_variants(["gguf:BF16"])), tmp_path / "out", RunOptions(jobs=2))
    reference = reference_of(folder, (data / "text" / "wiki.test.raw").read_text()[:20000], ROPE_LENGTHS)
    good = gguf_of(tmp_path / "out", "BF16")
    without = edited(good, tmp_path / "x.gguf", "rope_freqs.weight", lambda factors: factors * 0 + 1)
    reports = []
    for path in (good, without):
        with EngineProcess(path, options=LoadOptions(threads=1, context=512)) as engine:
            reports.append(engine_agreement(engine, reference.prompts, reference.logits))
    assert reports[0].problems == ()
    assert reports[1].problems
    assert reports[1].max_kld > 10 * reports[0].max_kld


@pytest.mark.long
def test_an_fp8_checkpoint_in_transformers(smollm2_variants: Path, smollm2_reference: Reference) -> None:
    folder = next(smollm2_variants.glob("*-FP8-dynamic"))
    with EngineProcess(folder, options=LoadOptions(threads=1)) as engine:
        report = engine_agreement(engine, smollm2_reference.prompts, smollm2_reference.logits)
        (answer,) = engine.generate_greedy([smollm2_reference.prompts[1]], 4)
    assert engine.facts.kind == "transformers"
    assert report.mean_kld < 0.2  # quantization itself: the reference is the original
    assert report.same_top >= 0.8
    assert len(answer.ids) <= 4


@requires_llama_cpp
def test_probabilities_where_the_choice_ends_within_a_character(models: Models) -> None:
    """llama.cpp leaves the probabilities out where the token that it would choose is half of a UTF-8 character."""
    path = models.gguf("llama3.1", "F32")
    variant = open_variant(path)
    prompts = [[number, number + 1] for number in range(300)]
    logits = all_logits(variant, np.array(prompts), Setting(dtype="f32"))[:, -1].log_softmax(-1)
    best = logits.argmax(-1).tolist()
    with EngineProcess(path, options=LoadOptions(threads=2)) as engine:
        texts = engine.detokenize([[number] for number in best])
        halves = [number for number, text in enumerate(texts) if "\ufffd" in text or not text][:8]
        assert halves, "no token of these is half of a character"
        found = engine.next_token_logprobs([prompts[number] for number in halves], 4)
    for number, logprobs in zip(halves, found, strict=True):
        assert logprobs.ids[0] == best[number]
        assert abs(logprobs.logprobs[0] - float(logits[number, best[number]])) < 0.01
