"""Every function of the API on a tiny model: records in and out, a listener that hears, errors with exit codes."""

import inspect
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

import streamquant
from streamquant.convert.plan.records import Plan
from tests.api.conftest import Recorder
from tests.attacks.harness import write_model

TO = ["fp8-dynamic", "gguf:Q8_0,Q4_0"]
ONE = streamquant.RunOptions(jobs=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("api") / "Tiny", size="small", shards=2)


@pytest.fixture(scope="module")
def variants(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("variants")
    streamquant.convert(model, TO, out, run=ONE)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def options_of(text: Path) -> streamquant.ValidationOptions:
    return streamquant.ValidationOptions(
        texts=(text,),
        context=32,
        chunks=2,
        skip=frozenset({"noise", "tokens", "chat", "lints", "engines", "behaviour"}),
        gates=streamquant.Gates(max_mean_kld=0.0),
    )


def test_formats() -> None:
    found = streamquant.formats()
    assert {"fp8-dynamic", "gguf:Q4_K_M"} <= {variant.spec for variant in found.variants}
    assert "LlamaForCausalLM" in {family.hf_architecture for family in found.families}


def test_plan(model: Path, tmp_path: Path) -> None:
    found = streamquant.plan(model, TO)
    assert isinstance(found, Plan)
    assert repr(found).startswith("<Plan of Tiny: fp8-dynamic, gguf:Q8_0, gguf:Q4_0; 4 files, ")
    assert [variant.recipe.spec for variant in found.variants] == ["fp8-dynamic", "gguf:Q8_0", "gguf:Q4_0"]
    assert streamquant.plan(str(model), "gguf:Q8_0").fingerprint == streamquant.plan(model, ["gguf:Q8_0"]).fingerprint
    assert streamquant.disk_use(found).peak == found.nbytes
    assert streamquant.disk_use(found, delete_after_upload=True).delivered
    streamquant.plan(model, TO, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_plan_names_what_is_wrong(model: Path, tmp_path: Path) -> None:
    with pytest.raises(streamquant.UsageError) as wrong:
        streamquant.plan(model, ["fp7"])
    assert wrong.value.exit_code == 2
    with pytest.raises(streamquant.UsageError, match="overrides without a variant that takes them"):
        streamquant.plan(
            model, ["fp8-dynamic"], streamquant.ConversionOptions(overrides=streamquant.Overrides(pure=True))
        )
    with pytest.raises(streamquant.UsageError, match="inside the source"):
        streamquant.plan(model, TO, out=model / "inside")
    with pytest.raises(streamquant.StreamquantError) as missing:
        streamquant.plan(tmp_path / "org" / "name", TO)  # a Path is never a name on the Hub
    assert missing.value.exit_code in (1, 2)


def test_convert(model: Path, tmp_path: Path, listener: Recorder) -> None:
    done = streamquant.convert(model, TO, tmp_path / "out", run=ONE, listener=listener)
    assert isinstance(done, streamquant.Conversion)
    assert all((tmp_path / "out" / file.path).stat().st_size == file.size for file in done.plan.files)
    assert len(listener.plans) == 1
    assert listener.units["converting"] == "bytes"
    assert listener.done["converting"] == listener.totals["converting"]
    again = streamquant.convert(str(model), TO, str(tmp_path / "out"), run=ONE)
    assert set(again.already_done) == {"fp8-dynamic", "gguf:Q8_0", "gguf:Q4_0"}


def test_a_recipe_is_a_variant(model: Path, variants: Path, tmp_path: Path) -> None:
    found = streamquant.recipe(next(variants.rglob("*Q4_0.gguf")), "Like")
    assert isinstance(found.recipe, streamquant.RecipeFile)
    (tmp_path / "like.yaml").write_text(found.recipe.yaml())
    planned = streamquant.plan(model, ["gguf:Q8_0", found.recipe])
    assert planned.fingerprint == streamquant.plan(model, ["gguf:Q8_0", tmp_path / "like.yaml"]).fingerprint
    assert planned.variants[1].recipe.label == "Like"


def test_inspect(variants: Path) -> None:
    files = streamquant.inspect(str(variants / "Tiny-GGUF"))
    assert {file.path.suffix for file in files} == {".gguf"}
    assert all(file.tensors and file.metadata for file in files)


def test_verify(model: Path, variants: Path, listener: Recorder) -> None:
    found = streamquant.verify(variants, model, listener=listener)
    assert [variant.problems for variant in found] == [[], [], []]
    assert all(variant.total.sqnr_db > 10 for variant in found)
    assert listener.units["verifying"] == "bytes"
    assert 0.99 < listener.done["verifying"] / (listener.totals["verifying"] or 1) <= 1
    with pytest.raises(streamquant.UsageError, match="nothing to verify"):
        streamquant.verify(model)


def test_imatrix(model: Path, text: Path, tmp_path: Path, listener: Recorder) -> None:
    made = streamquant.imatrix(model, [text], tmp_path / "imatrix.gguf", context=32, chunks=2, listener=listener)
    assert made.chunks == 2
    assert listener.done["layers"] == listener.totals["layers"]
    options = streamquant.ConversionOptions(imatrix=streamquant.read_imatrix(made.path))
    planned = streamquant.plan(model, ["gguf:Q4_K_M"], options)
    assert planned.options.imatrix is not None


def test_validate(model: Path, variants: Path, text: Path, tmp_path: Path, listener: Recorder) -> None:
    files = sorted(variants.rglob("*.gguf"))
    report = streamquant.validate(model, files, options_of(text), out=tmp_path / "report", listener=listener)
    assert isinstance(report, streamquant.Report)
    assert not all(gate.passed for gate in report.gate_results)  # told, not raised
    assert listener.done["layers"] == listener.totals["layers"]
    assert (tmp_path / "report" / "report.html").is_file()
    again = streamquant.read_report(tmp_path / "report")
    assert again.gate_results == report.gate_results
    assert "mean KL" in again._repr_html_()
    assert streamquant.write_pages(again, tmp_path / "pages")
    assert streamquant.validate(model, files[:1], options_of(text)).gate_results  # nothing is written


def test_chat_check(model: Path, variants: Path) -> None:
    checked = streamquant.chat_check(model, sorted(variants.rglob("*.gguf"))[:1])
    assert isinstance(checked, streamquant.ChatCheck)
    assert len(checked.variants) == 1


def test_card(variants: Path) -> None:
    cards = streamquant.card(variants, streamquant.CardOptions(base_model="ORG/Tiny", prompts=False))
    assert {path.name for path in cards} == {"README.md"}
    with pytest.raises(streamquant.StreamquantError):
        streamquant.card(variants / "no-such-folder")


def test_push_refuses_what_was_not_measured(variants: Path) -> None:
    with pytest.raises(streamquant.GateFailedError) as refused:
        streamquant.push(variants, "ORG/Tiny")
    assert refused.value.exit_code == 3


def test_run(model: Path, tmp_path: Path, listener: Recorder) -> None:
    release = tmp_path / "release.yaml"
    release.write_text(yaml.safe_dump({"model": str(model), "out": "made", "variants": ["gguf:Q8_0"]}))
    outcomes = streamquant.run(release, listener=listener)
    assert listener.outcomes == outcomes
    assert [outcome.state for outcome in outcomes] == ["done"] * len(outcomes)
    assert [path.name for path in (tmp_path / "made").rglob("*.gguf")] == ["Tiny-Q8_0.gguf"]


def test_records_are_frozen() -> None:
    options = [streamquant.ConversionOptions, streamquant.RunOptions, streamquant.ValidationOptions]
    options += [streamquant.PushOptions, streamquant.CardOptions, streamquant.ReleaseOptions, streamquant.EarlyPush]
    for record in options:
        assert is_dataclass(record)
        assert record.__dataclass_params__.frozen, record  # type: ignore[attr-defined]


def test_errors_are_one_tree() -> None:
    found = [getattr(streamquant, name) for name in streamquant.__all__]
    errors = [kind for kind in found if inspect.isclass(kind) and issubclass(kind, streamquant.StreamquantError)]
    assert {error: error.exit_code for error in errors} == {
        streamquant.StreamquantError: 1,
        streamquant.UsageError: 2,
        streamquant.GateFailedError: 3,
    }
    assert all(kind in errors for kind in found if inspect.isclass(kind) and issubclass(kind, BaseException))
