"""Embedding models and rerankers against llama.cpp's converter, byte for byte, and their hostile modules.json."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from streamquant.convert.conversion import convert
from streamquant.convert.metadata import pretokenizer
from streamquant.convert.metadata.embedding import CLASSIFIER
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.listener import SILENT
from streamquant.model.variants.open import open_original
from streamquant.quant.errors import StreamquantError
from streamquant.validate.options import ValidationOptions
from streamquant.validate.readback.embedding import check_embedding
from streamquant.validate.run import ValidationRun, open_candidates
from tests import gguf_peer, synthetic
from tests.gguf_peer import Job, read_gguf
from tests.tokenizer_folders import byte_level, write_case

POOLING = "1_Pooling"
LAST: dict[str, object] = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True}


def write(folder: Path, pooling: dict[str, object] | None = None, *, body: bool = False, **settings: Any) -> Path:
    """A checkpoint with a tokenizer of Qwen's kind; `body`: saved by AutoModel, without `model.` and head.

    A model called Reranker has the tokens "yes" and "no".
    """
    text = "yes no " * 50 if "Reranker" in folder.name else "the end"
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend = byte_level(pretokenizer._QWEN2, special=special, text=text)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    kind = folder.parent / f"tokenizer-{folder.name}"
    tokenizer = write_case(kind, backend, "qwen3", pre=None, eos_token="<|im_end|>", chat_template="{{ messages }}")
    settings = {"architecture": "Qwen3ForCausalLM", "tied": True, "extra_side_files": False, **settings}
    synthetic.write_checkpoint(folder, tokenizer=tokenizer.folder, **settings)
    if pooling is not None:
        types = {"": "Transformer", POOLING: "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (path, kind) in enumerate(types.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / POOLING).mkdir()
        (folder / POOLING / "config.json").write_text(json.dumps(pooling))
    if body:
        strip(folder)
    return folder


def strip(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (shard,) = folder.glob("*.safetensors")
    tensors = {
        name.removeprefix("model."): tensor for name, tensor in load_file(shard).items() if "lm_head" not in name
    }
    save_file(tensors, shard, {"format": "pt"})


MODELS: dict[str, dict[str, Any]] = {
    "embedding": {"pooling": LAST},
    "body": {"pooling": LAST, "body": True},
    "body-untied": {"pooling": LAST, "body": True, "tied": False},
    "mean": {"pooling": {"pooling_mode": "mean"}, "architecture": "Qwen2ForCausalLM"},
    "cls": {"pooling": {"pooling_mode_cls_token": True}, "architecture": "Qwen2ForCausalLM"},
    "Qwen3-Reranker-tied": {},
    "Qwen3-Reranker-untied": {"tied": False},
    "Qwen3-Reranker-pooled": {"pooling": LAST},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embeddings")
    return {name: write(root / name, **settings) for name, settings in MODELS.items()}


def converted(source: Path, out: Path, *variants: str) -> list[Path]:
    plan = make_plan(open_checkpoint(source), parse_variants([*variants]), ConversionOptions(pre="qwen2"))
    convert(plan, out, RunOptions(jobs=1))
    return sorted(out.rglob("*.gguf"))


@pytest.fixture(scope="module")
def references(sources: dict[str, Path], peers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("references")
    gguf_peer.convert_many(
        [
            Job(str(source), kind, str(out / f"{name}-{kind.upper()}.gguf"), pre="qwen2")
            for name, source in sources.items()
            for kind in ("bf16", "q8_0")
        ]
    )
    return out


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference_converter(name: str, sources: dict[str, Path], references: Path, tmp_path: Path) -> None:
    files = converted(sources[name], tmp_path, "gguf:BF16,Q8_0")
    assert len(files) == 2
    for file in files:
        reference = references / file.name
        ours, theirs = read_gguf(file), read_gguf(reference)
        assert ours[0] == theirs[0]
        assert list(ours[1]) == list(theirs[1])
        assert filecmp.cmp(file, reference, shallow=False)
        arch = "qwen2" if name in ("mean", "cls") else "qwen3"
        kind = {"mean": 1, "cls": 2}.get(name, 4 if "Reranker" in name else 3)
        assert ours[0][f"{arch}.pooling_type"][1] == kind
        assert (CLASSIFIER in ours[1]) == ("Reranker" in name)


@pytest.mark.parametrize("variant", ["gguf:Q4_K_M", "gguf:F16", "gguf:Q4_0"])
def test_a_reranker_in_other_types_is_verified(variant: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from streamquant.validate.readback.verify import verify

    (file,) = converted(sources["Qwen3-Reranker-untied"], tmp_path, variant)
    _, tensors = read_gguf(file)
    assert tensors[CLASSIFIER][1][0] == 2
    assert "output.weight" not in tensors
    (found,) = verify(file.parent, open_checkpoint(sources["Qwen3-Reranker-untied"]))
    assert found.problems == []


def test_a_reranker_is_read_with_a_warning(sources: dict[str, Path], tmp_path: Path) -> None:
    from streamquant.model.variants.open import open_variant

    (file,) = converted(sources["Qwen3-Reranker-untied"], tmp_path, "gguf:Q8_0")
    assert [(problem.check, problem.severity) for problem in open_variant(file).problems] == [("reranker", "warning")]


@pytest.mark.parametrize("value", [10**400, -(10**39), 1e300])
def test_sampling_settings_beyond_float32(tmp_path: Path, value: float) -> None:
    source = write(tmp_path / "x")
    (source / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(StreamquantError, match="wrong sampling setting"):
        plan_of(source)


def test_fp8_folders_keep_the_modules(sources: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(sources["body"]), parse_variants(["fp8-dynamic"]))
    convert(plan, tmp_path, RunOptions(jobs=1))
    (folder,) = tmp_path.glob("*FP8*")
    for name in ("modules.json", f"{POOLING}/config.json"):
        assert (folder / name).read_bytes() == (sources["body"] / name).read_bytes()


# --- hostile ----------------------------------------------------------------------------------------------------------


def plan_of(source: Path) -> tuple[str, ...]:
    return make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"]), ConversionOptions(pre="qwen2")).notes


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "wrong type"),
        ([3], r"wrong type\n.*modules.json\[0\]"),
        ([{"type": "x"}], r"\[0\].path"),
        ([{"type": 3, "path": ""}], r"\[0\].type"),
        ([{"type": "models.Pooling", "path": "../1_Pooling"}], "not one of the checkpoint's"),
        ([{"type": "models.Pooling", "path": "/etc"}], "not one of the checkpoint's"),
        ([{"type": "models.Pooling", "path": "7_Pooling"}], "no such file, and modules.json names it"),
    ],
)
def test_hostile_modules(tmp_path: Path, modules: object, message: str) -> None:
    source = write(tmp_path / "x", LAST)
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StreamquantError, match=message):
        plan_of(source)


@pytest.mark.parametrize(
    "pooling",
    [{}, {"pooling_mode": "max"}, {"pooling_mode": 3}, {"pooling_mode_max_tokens": True},
     {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}],
)  # fmt: skip
def test_poolings_that_llama_cpp_has_not(tmp_path: Path, pooling: dict[str, object]) -> None:
    with pytest.raises(StreamquantError, match=r"a pooling that llama\.cpp has not"):
        plan_of(write(tmp_path / "x", pooling))


def test_what_the_plan_says(tmp_path: Path) -> None:
    notes = plan_of(write(tmp_path / "x", LAST))
    assert f"qwen3.pooling_type = 3 (LAST): an embedding model, by {POOLING}/config.json" in notes
    other = write(tmp_path / "llama", LAST, architecture="LlamaForCausalLM")
    assert any(note.startswith("WARNING: an embedding model") and "--pooling last" in note for note in plan_of(other))
    modules = json.loads((other / "modules.json").read_text())
    modules.append({"type": "sentence_transformers.models.Dense", "path": "3_Dense"})
    (other / "modules.json").write_text(json.dumps(modules))
    assert any("has a step Dense (3_Dense)" in note for note in plan_of(other))


def test_a_reranker_whose_answers_are_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(StreamquantError, match="a reranker whose answers are no tokens"):
        plan_of(write(tmp_path / "qwen3-reranker"))
    source = write(tmp_path / "y")
    (source / "README.md").write_text("# Qwen3-Reranker-0.6B\n")
    with pytest.raises(StreamquantError, match="a reranker whose answers are no tokens"):
        plan_of(source)
    shutil.rmtree(source)


# What validate says of them


def test_what_chat_check_says_of_an_embedding_model(tmp_path: Path) -> None:
    """The note on every variant; an error where the pooling is another or was lost."""
    source = write(tmp_path / "Tiny", LAST)
    to = parse_variants(["gguf:Q8_0", "fp8-dynamic"])
    convert(make_plan(open_checkpoint(source), to), tmp_path / "out", RunOptions())
    folder, gguf = tmp_path / "out" / "Tiny-FP8-dynamic", tmp_path / "out" / "Tiny-GGUF" / "Tiny-Q8_0.gguf"
    assert _said(source, folder, gguf) == {"note": 2, "error": 0}
    (folder / "modules.json").unlink()
    data = gguf.read_bytes()
    key = b"qwen3.pooling_type" + (4).to_bytes(4, "little")
    assert data.count(key + b"\3") == 1
    gguf.write_bytes(data.replace(key + b"\3", key + b"\1"))
    assert _said(source, folder, gguf) == {"note": 2, "error": 2}


def test_what_chat_check_says_of_a_reranker(tmp_path: Path) -> None:
    source = write(tmp_path / "Qwen3-Reranker-Tiny")
    convert(make_plan(open_checkpoint(source), parse_variants(["gguf:Q8_0"])), tmp_path / "out", RunOptions())
    (gguf,) = (tmp_path / "out").glob("*/*.gguf")
    assert _said(source, gguf) == {"warning": 1, "error": 0}  # the file has its own warning of scores
    gguf.write_bytes(gguf.read_bytes().replace(b"classifier.output_labels", b"classifier.output_labelz"))
    assert _said(source, gguf) == {"warning": 1, "error": 1}


def _said(source: Path, *variants: Path) -> dict[str, int]:
    """How many problems of each severity of a check of pooling."""
    run = ValidationRun(open_original(source), open_candidates(variants), ValidationOptions(()), SILENT)
    check_embedding(run)
    found = [p for c in run.candidates for p in c.problems if p.check in ("embedding", "pooling", "reranker")]
    kinds = {problem.severity for problem in found} | {"error"}
    return {kind: sum(problem.severity == kind for problem in found) for kind in kinds}
