"""vLLM as the engine of FP8 folders. What needs vLLM itself runs in an environment of its own: make test-vllm."""

from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Setting
from streamquant.model.variants.open import open_variant
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines import engine as engines
from streamquant.validate.engines import process
from streamquant.validate.engines.agreement import engine_agreement, prompts_from
from streamquant.validate.engines.check import last_logits
from streamquant.validate.engines.engine import EngineLoadError, TemplateRequest, engines_for, is_installed
from streamquant.validate.engines.process import EngineProcess, LoadOptions, open_engine
from streamquant.validate.options import ValidationOptions
from streamquant.validate.sections import SKIPPABLE
from streamquant.validate.validation import validate
from tests.conftest import Shelf
from tests.validate.report_fixtures import small_options, write_text

requires_vllm = pytest.mark.skipif(not is_installed("vllm"), reason="vLLM is not installed here: make test-vllm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_vllm_runs_folders_where_it_is_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = folder / "x.gguf"
    gguf.touch()
    for there, chosen in ((True, ("vllm", "transformers")), (False, ("transformers",))):
        monkeypatch.setattr(engines, "is_installed", lambda _engine, there=there: there)
        assert engines_for(folder, None) == chosen
        assert engines_for(folder, "vllm") == ("vllm",)
        assert engines_for(folder, "transformers") == ("transformers",)
        assert engines_for(gguf, "vllm") == ("llama.cpp",)


def test_an_engine_that_cannot_be_used_here_gives_way_and_a_refusal_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    wrong: StreamquantError = UsageError("the engine vllm is not installed")

    def load(self: EngineProcess, path: Path, *, kind: str, options: LoadOptions) -> None:
        tried.append(kind)
        if kind == "vllm":
            raise wrong

    monkeypatch.setattr(EngineProcess, "__init__", load)
    monkeypatch.setattr(process, "engines_for", lambda _path, _wanted: ("vllm", "transformers"))
    open_engine(folder, None, LoadOptions())
    assert tried == ["vllm", "transformers"]
    wrong = EngineLoadError("the engine cannot load the model", model=folder)
    with pytest.raises(EngineLoadError):
        open_engine(folder, None, LoadOptions())


def test_a_validation_uses_the_engine_of_its_options(
    tiny: Path, four_variants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def load(self: EngineProcess, path: Path, *, kind: str, **_options: object) -> None:
        asked.append((path.suffix, kind))
        raise EngineLoadError("the engine cannot load the model", model=path)

    monkeypatch.setattr(EngineProcess, "__init__", load)
    skip = frozenset(SKIPPABLE) - {"engines"}
    for engine in (None, "transformers"):
        text = write_text(tmp_path / "text.txt")
        validate(tiny, four_variants[:2], small_options(text, chunks=2, skip=skip, engine=engine))
    assert asked == [("", "vllm" if is_installed("vllm") else "transformers"), (".gguf", "llama.cpp"),
                     ("", "transformers"), (".gguf", "llama.cpp")]  # fmt: skip


def test_an_engine_that_is_asked_for_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown name"):
        ValidationOptions((), engine="sglang")  # type: ignore[arg-type] # on purpose
    monkeypatch.setattr("streamquant.validate.options.is_installed", lambda _engine: False)
    with pytest.raises(UsageError, match="vllm is not installed"):
        ValidationOptions((), engine="vllm")


@pytest.fixture(scope="session")
def smollm2_fp8(shelf: Shelf, smollm2: Path) -> Path:
    """SmolLM2 in FP8 as vLLM serves it."""

    def make(folder: Path) -> None:
        convert(make_plan(open_checkpoint(smollm2), parse_variants(["fp8-dynamic"])), folder, RunOptions(jobs=2))

    return next(shelf.get("smollm2-fp8", make).glob("*-FP8-dynamic"))


@requires_vllm
@pytest.mark.long
def test_vllm_agrees_with_our_pass(smollm2_fp8: Path, data: Path) -> None:
    """The same FP8 folder in vLLM and in the layer-streamed pass: probabilities, and an answer that is true."""
    text = (data / "text" / "wiki.test.raw").read_text()[:20000]
    with EngineProcess(smollm2_fp8, kind="vllm", options=LoadOptions(context=256)) as engine:
        assert engine.facts.kind == "vllm"
        (ids,) = engine.tokenize([text], add_special=False, parse_special=False)
        prompts = prompts_from(ids, (2, 8, 32, 64, 128))
        variant = open_variant(smollm2_fp8)
        found = engine_agreement(engine, prompts, lambda asked: last_logits(variant, asked, Setting()))
        assert found.problems == ()
        question = TemplateRequest(({"role": "user", "content": "What is the capital of France?"},))
        (asked,) = engine.apply_template([question])
        (answer,) = engine.generate_greedy([asked.ids], 24)
    assert "Paris" in answer.text
    assert answer.stopped
