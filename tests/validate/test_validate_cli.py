"""validate, imatrix, chat-check and report on the command line: what they write and say, and their exit codes."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from streamquant.cli import app as command_line
from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.gguf_file import read_header
from streamquant.model.forward import Setting, all_logits
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.check import last_logits
from streamquant.validate.engines.engine import EngineLoadError
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.logits.hidden_states import prune_cache
from streamquant.validate.options import ValidationOptions
from streamquant.validate.report.data import read_report
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.text.chat_suite import chat_cases
from streamquant.validate.validation import validate
from tests.attacks.harness import write_model
from tests.peers import requires_llama_cpp
from tests.small_models import edit_gguf
from tests.validate.engine_fixtures import Model
from tests.validate.report_fixtures import CONTEXT, ENGINES, small_options, write_text


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs the command line in this process, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["streamquant", *map(str, arguments)])
        capsys.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Result(code, *capsys.readouterr())

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def quick(text: Path, out: Path) -> list[object]:
    """Options of a validation without engines."""
    return ["--text", text, "--out", out, "--context", CONTEXT, "--chunks", 2, "--skip", ",".join(sorted(ENGINES))]


# --- validate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "imatrix", "chat-check", "report"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Example" in result.out


def test_a_validation_writes_its_report(
    run: Run, tiny: Path, four_variants: list[Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    result = run("validate", tiny, *four_variants, *quick(text, out))
    assert result.code == 0, result.err
    assert "No fault was found in 4 variants" in result.out
    report = read_report(out)
    assert [variant.label for variant in report.variants] == [
        "Tiny-FP8-dynamic",
        "Tiny-BF16",
        "Tiny-Q8_0",
        "Tiny-Q4_K_M",
    ]
    assert report.command[:2] == ("streamquant", "validate")
    assert str(text) in report.command
    assert {note.section for note in report.not_run} == ENGINES
    assert report.comparison.chunks == 2
    assert not report.comparison.effort.original_cached
    klds = [result.overall.kld.value for result in report.comparison.variants]
    assert klds[1] < klds[2] < klds[3]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"report.json", "report.md", "report.html", "size-kld.png", "delta-p.svg"}

    again = run("validate", tiny, four_variants[1], *quick(text, out), "--max-mean-kld", "0")
    assert again.code == 3
    assert "gate failed: Tiny-BF16: --max-mean-kld 0, found" in again.err
    assert read_report(out).comparison.effort.original_cached
    assert (out / "report.json").read_bytes() != before[out / "report.json"]

    rendered = run("report", out, "--out", tmp_path / "elsewhere")
    assert rendered.code == 0
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == (out / "report.html").read_bytes()
    assert (tmp_path / "elsewhere" / "plots" / "layers.png").is_file()


def test_wrong_commands(run: Run, tiny: Path, four_variants: list[Path], text: Path, tmp_path: Path) -> None:
    """Exit code 2, before anything is computed."""
    good: list[object] = ["validate", tiny, four_variants[1], *quick(text, tmp_path / "out")]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    for wrong, named in (
        (["--device", "tpu"], "no such device"),
        (["--dtype", "f16"], "no such dtype"),
        (["--skip", "chats"], "unknown name"),
        (["--noise", "seed"], "unknown name"),
        (["--min-same-top", "97"], "a share is at most 1"),
        (["--max-mean-kld", "-1"], "not a limit"),
        (["--out", tmp_path / "thesis"], "holds other files"),
        (["--text", tmp_path / "missing.txt"], "cannot read a text"),
        (["--context", "4000"], "too short"),
    ):
        result = run(*good, *wrong)
        assert result.code == (1 if "missing" in str(wrong) else 2), (wrong, result)
        assert named in result.err
    for variants in ([tmp_path / "missing.gguf"], [four_variants[1], four_variants[1]]):
        assert run("validate", tiny, *variants, *quick(text, tmp_path / "out")).code == 2
    assert run("validate", tiny, *quick(text, tmp_path / "out")).code == 2
    assert run("report", tmp_path).code == 2
    assert not (tmp_path / "out").exists()


# --- variants that cannot be read -----------------------------------------------------------------------------------


def broken_inside(good: Path, out: Path) -> Path:
    """A scale that is NaN: the headers are fine, and it shows when the second layer is read."""

    def spoil(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows = rows.copy()
        rows[0, :2].view(np.float16)[:] = np.nan
        return rows

    return edit_gguf(good, out, tensors={"blk.1.ffn_up.weight": spoil})


def test_a_variant_that_breaks_while_it_is_read_does_not_end_the_others(
    tiny: Path, four_variants: list[Path], text: Path, tmp_path: Path
) -> None:
    broken = broken_inside(four_variants[2], tmp_path / "Tiny-Q8_0-broken.gguf")
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes(four_variants[1].read_bytes()[:-4096])
    report = validate(tiny, [broken, four_variants[2], truncated], small_options(text))
    first, second, third = report.variants
    for variant, what in ((first, "blk.1.ffn_up"), (third, "cut.gguf")):
        (problem,) = [item for item in variant.problems if item.check == "unreadable"]
        assert problem.severity == "error"
        assert what in str(problem) or "ffn_up" in str(problem) or "mlp.up_proj" in str(problem)
        assert report.measured(variant) is None
    assert second.problems == ()
    assert report.measured(second) is not None
    assert [gate.variant for gate in report.gate_results if not gate.passed] == [first.label, third.label]


def test_a_broken_original_ends_it(tiny: Path, four_variants: list[Path], text: Path, tmp_path: Path) -> None:
    broken = broken_inside(four_variants[2], tmp_path / "Tiny-Q8_0.gguf")
    with pytest.raises(StreamquantError, match="NaN"):
        validate(broken, [four_variants[1]], small_options(text, tokenizer=tiny))


def test_a_gguf_as_the_reference(tiny: Path, four_variants: list[Path], text: Path) -> None:
    """BF16 in GGUF is the checkpoint itself; tokens and chat have nothing to be compared with, and say so."""
    options = small_options(text, tokenizer=tiny, skip=frozenset(SKIPPABLE) - {"tokens"})
    report = validate(four_variants[1], [four_variants[2]], options)
    (result,) = report.comparison.variants
    assert 0 < result.overall.kld.value < 0.01
    (note,) = [note for note in report.not_run if note.section == "tokens"]
    assert "the original is a GGUF file" in note.reason


def test_two_variants_of_one_name(tiny: Path, four_variants: list[Path], text: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(four_variants[2], tmp_path / folder)
    paths = [tmp_path / folder / four_variants[2].name for folder in ("a", "b")]
    labels = [variant.label for variant in validate(tiny, paths, small_options(text)).variants]
    assert labels == ["a/Tiny-Q8_0", "b/Tiny-Q8_0"]
    with pytest.raises(UsageError, match="given twice"):
        validate(tiny, [paths[0], paths[0]], small_options(text))


# --- engines --------------------------------------------------------------------------------------------------------


def test_the_last_logits_of_prompts(tiny: Path) -> None:
    """As the whole pass over each prompt alone."""
    variant, setting = open_variant(tiny), Setting()
    prompts = [[5, 6], list(range(40)), [1] * 200, [9]]
    found = last_logits(variant, prompts, setting)
    for row, prompt in zip(found, prompts, strict=True):
        expected = all_logits(variant, np.array([prompt]), setting)[0, -1].numpy()
        assert np.allclose(row, expected, atol=1e-4)


def test_what_cannot_run_is_stated(
    tiny: Path, four_variants: list[Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is missing, a file that the engine refuses, a model that does not fit: each with its reason."""

    def fail(self: EngineProcess, path: Path, **options: object) -> None:
        if path.suffix == ".gguf":
            raise UsageError("the engine llama.cpp is not installed", required="the Python package xllamacpp")
        raise EngineLoadError("it does not start", model=path, where=str(path), found="it is strange")

    monkeypatch.setattr(EngineProcess, "__init__", fail)
    options = small_options(text, skip=frozenset(SKIPPABLE) - {"engines", "tokens"})
    report = validate(tiny, four_variants[:2], options)
    reasons = {(note.section, note.variant): note.reason for note in report.not_run}
    assert "cannot be loaded" in reasons["tokens", None]
    assert "it is strange" in reasons["engines", "Tiny-FP8-dynamic"]
    assert "xllamacpp" in reasons["engines", "Tiny-BF16"]
    refused, missing = report.variants
    assert [problem.check for problem in refused.problems] == ["engine"]
    assert missing.problems == ()
    monkeypatch.setattr("streamquant.validate.engines.reference.available_memory", lambda: 1000)
    report = validate(tiny, four_variants[1:2], options)
    assert any("900 are free" in note.reason for note in report.not_run)


@requires_llama_cpp
@pytest.mark.long
def test_everything_on_a_real_model(smollm2: Path, smollm2_variants: Path, data: Path) -> None:
    """SmolLM2 as Q8_0: every section runs, nothing is wrong."""
    (variant,) = smollm2_variants.glob("*-GGUF/*-Q8_0.gguf")
    options = ValidationOptions((data / "text" / "wiki.test.raw",), chunks=2, answer_tokens=8, lengths=(2, 32, 128))
    report = validate(smollm2, [variant], options)
    (found,) = report.variants
    assert found.errors == 0, found.problems
    assert found.tokens is not None
    assert found.chat is not None
    assert found.engine is not None
    assert found.behaviour is not None
    assert found.engine.agrees
    assert report.not_run == ()


# --- imatrix --------------------------------------------------------------------------------------------------------


def test_imatrix_is_read_by_convert(run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    options = ["--text", text, "--out", out, "--context", CONTEXT]
    first = run("imatrix", tiny, *options, "--chunks", 2)
    assert first.code == 0, first.err
    assert "over 2 chunks" in first.out
    second = run("imatrix", tiny, *options, "--chunks", 5, "--save-every", 2)
    assert "2 of them from before" in second.out
    assert read_header(out).metadata["imatrix.chunk_count"] == 5
    assert len(read_imatrix(out).entries) == 3 * 7
    done = run("convert", tiny, "--to", "gguf:Q4_K_M", "--imatrix", out, "--out", tmp_path / "v", "--pre", "llama-bpe")
    assert done.code == 0, done.err
    other = run("imatrix", tiny, "--text", write_text(tmp_path / "o.txt", "xyz"), "--out", out, "--context", CONTEXT)
    assert other.code == 1
    assert "not the beginning of this importance matrix" in other.err


# --- chat-check -----------------------------------------------------------------------------------------------------


@requires_llama_cpp
@pytest.mark.long
def test_chat_check(run: Run, hermes_llama: Model, tmp_path: Path) -> None:
    good = run("chat-check", hermes_llama.source, hermes_llama.gguf, hermes_llama.fp8)
    assert good.code == 0, good.out
    folder = tmp_path / "fp8"
    shutil.copytree(hermes_llama.fp8, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("# Tools", "# tools"))
    bad = run("chat-check", hermes_llama.source, folder, "--json")
    assert bad.code == 3
    found = json.loads(bad.out)
    assert found["variants"][0]["chat"]["cases"] == len(list(chat_cases()))
    assert found["variants"][0]["problems"][0]["check"] == "chat"
    assert run("chat-check", hermes_llama.source, tmp_path / "missing.gguf").code == 2


@requires_llama_cpp
def test_a_model_without_a_chat_template(run: Run, tmp_path: Path) -> None:
    """A base model is none the worse for it: there is nothing to compare."""
    model = write_model(tmp_path / "Base")
    convert(make_plan(open_checkpoint(model), parse_variants(["gguf:Q8_0"])), tmp_path / "out", RunOptions(jobs=1))
    done = run("chat-check", model, tmp_path / "out" / "Base-GGUF" / "Base-Q8_0.gguf", "--json")
    assert done.code == 0, done.out
    reason = "the original has no chat template"
    note = {"section": "chat", "variant": None, "reason": reason, "requested": False, "nothing_to_check": True}
    assert note in json.loads(done.out)["not_run"]


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_the_newest(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / f"hidden-states-{number}.safetensors"
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    (tmp_path / "notes.txt").touch()
    prune_cache(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hidden-states-2.safetensors", "hidden-states-3.safetensors", "notes.txt"
    ]  # fmt: skip
    prune_cache(tmp_path, 0)
    assert [path.name for path in tmp_path.glob("hidden*")] == ["hidden-states-3.safetensors"]
    prune_cache(tmp_path / "missing")
