"""The file of a release: what is read of it, and every way in which it is refused, by its place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from streamquant.files.strict_yaml import MAX_BYTES
from streamquant.publish.release.release_file import STAGES, ReleaseFile, read_release, stage_name
from streamquant.publish.upload.options import PushOptions
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.gates import Gates

LEAST: dict[str, Any] = {"model": "Tiny", "variants": ["gguf:Q8_0"]}
RECIPE = {"label": "Mine", "base": "Q4_K_M", "tensor-type": ["attn_v=Q8_0"]}


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    """A folder of the name in LEAST."""
    (tmp_path / "Tiny").mkdir()
    return tmp_path / "Tiny"


def read(folder: Path, text: str | dict[str, Any]) -> ReleaseFile:
    path = folder / "release.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return read_release(path)


def test_the_least(tmp_path: Path) -> None:
    found = read(tmp_path, LEAST)
    assert found.model == str(tmp_path / "Tiny")
    assert found.out == tmp_path / "variants"
    assert [recipe.spec for recipe in found.recipes] == ["gguf:Q8_0"]
    assert found.stages == ("plan", "convert")


def test_everything(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "more.json").write_text('{"general.author": "me"}')
    found = read(
        tmp_path,
        """
        model: NousResearch/Hermes-4-14B@main
        out: made
        name: Hermes
        split_max_size: 45G
        max-shard-size: 5000000000
        pre: llama-bpe
        metadata: more.json
        guard_template: true
        tensor-type: [ffn_down=q6_k]
        output_tensor_type: q8_0
        spool_gib: 60
        device: cpu
        jobs: 3
        variants: [fp8-dynamic, "gguf:Q8_0,Q4_K_M", {recipe: mine.yaml}]
        imatrix: {text: [a.txt, b.txt], chunks: 7, context: 128, save_every: 2, dtype: bf16, exclude_weights: attn_k}
        verify: {source: true}
        validate:
          text: c.txt
          chunks: 20
          gates: {max_mean_kld: 0.1, max-errors: 3}
          skip: [engines, behaviour]
          noise: []
          report: report
        card: {quantized_by: me}
        push: {repo: me/Hermes, private: true, without_report: false}
        """,
    )
    options = found.options
    assert (found.model, found.out, options.name) == ("NousResearch/Hermes-4-14B@main", tmp_path / "made", "Hermes")
    assert (options.split_max_size, options.max_shard_size) == (45 * 10**9, 5 * 10**9)
    assert [recipe.spec for recipe in found.recipes] == ["fp8-dynamic", "gguf:Q8_0", "gguf:Q4_K_M", "gguf:Mine"]
    assert options.overrides.record() == {"tensor-type": ["ffn_down=Q6_K"], "output-tensor-type": "Q8_0"}
    assert options.metadata == {"general.author": "me"}
    assert (options.pre, options.guard_template, found.spool_gib, found.device, found.jobs) == (
        *("llama-bpe", True, 60.0, "cpu", 3),
    )
    assert found.imatrix is not None
    assert found.validate is not None
    assert found.push is not None
    assert found.imatrix.text == (tmp_path / "a.txt", tmp_path / "b.txt")
    assert (found.imatrix.chunks, found.imatrix.context, found.imatrix.save_every) == (7, 128, 2)
    assert (found.imatrix.dtype, found.imatrix.exclude_weights) == ("bf16", ("attn_k",))
    assert found.validate.gates == Gates(max_mean_kld=0.1, max_errors=3)
    assert (found.validate.text, found.validate.report) == ((tmp_path / "c.txt",), tmp_path / "report")
    assert (found.validate.skip, found.validate.noise) == (("engines", "behaviour"), ())
    assert (found.push.repo, found.push.options) == ("me/Hermes", PushOptions(private=True))
    assert found.stages == STAGES


def test_a_report_lies_beside_the_variants_unless_told_otherwise(tmp_path: Path) -> None:
    found = read(tmp_path, {**LEAST, "out": "made", "validate": {"text": "c.txt"}})
    assert found.validate is not None
    assert found.validate.report == tmp_path / "made" / "report"
    assert found.validate.noise == ("batch",)


REFUSED: dict[str, tuple[str | dict[str, Any], str, str]] = {
    "no table": ("- a\n- b\n", "not a table", "a table of model"),
    "nothing": ("", "not a table", "found:    None"),
    "broken": ("model: [", "broken YAML", "release.yaml"),
    "a tag": ("model: !!python/object/apply:os.system [id]", "broken YAML", "tags (!name) are not allowed"),
    "an anchor": ("model: &a Tiny\nname: *a", "broken YAML", "anchors and aliases"),
    "a key twice": ("model: Tiny\nmodel: Other", "broken YAML", "occurs twice"),
    "two spellings": ({**LEAST, "split_max_size": "1G", "split-max-size": "2G"}, "a key is given twice", "split"),
    "an unknown key": ({**LEAST, "modle": "x"}, "unknown key", "did you mean model?"),
    "an unknown key within": (
        {**LEAST, "validate": {"text": "a", "gates": {"max_mean_kdl": 1}}},
        "unknown key",
        "release.yaml, validate, gates",
    ),
    "the nearest gate": (
        {**LEAST, "validate": {"text": "a", "gates": {"max_mean_kdl": 1}}},
        "unknown key",
        "did you mean max_mean_kld?",
    ),
    "no model": ({"variants": ["gguf:Q8_0"]}, "no model", "release.yaml, model"),
    "a model that is none": ({**LEAST, "model": 3}, "wrong value", "release.yaml, model"),
    "no variants": ({"model": "Tiny"}, "no variants", "release.yaml, variants"),
    "an unknown variant": ({**LEAST, "variants": ["gguf:Q9"]}, "unknown variant", "gguf:Q9"),
    "a recipe that is not there": ({**LEAST, "variants": [{"recipe": "no.yaml"}]}, "cannot read a file", "no.yaml"),
    "another table": ({**LEAST, "variants": [{"recipes": "a"}]}, "unknown key", "variants, entry 1"),
    "a size": ({**LEAST, "split_max_size": "45 gigs"}, "not a size", "release.yaml, split_max_size"),
    "a flag": ({**LEAST, "guard_template": "yes"}, "wrong value", "true or false"),
    "a number": ({**LEAST, "spool_gib": -1}, "wrong value", "a positive number"),
    "a true number": ({**LEAST, "jobs": True}, "wrong value", "a whole number"),
    "a device": ({**LEAST, "device": "gpu"}, "wrong value", "release.yaml, device"),
    "overrides for nobody": ({**LEAST, "variants": ["fp8-dynamic"], "pure": True}, "overrides without", "pure"),
    "an override": ({**LEAST, "output_tensor_type": "Q9"}, "unknown type", "output-tensor-type"),
    "no imatrix": ({**LEAST, "imatrix": {}}, "no importance matrix", "release.yaml, imatrix"),
    "two of them": ({**LEAST, "imatrix": {"file": "a", "text": "b"}}, "two importance matrices", "imatrix"),
    "no text": ({**LEAST, "validate": {"chunks": 3}}, "no text to measure on", "validate, text"),
    "a text that is none": ({**LEAST, "validate": {"text": [3]}}, "wrong value", "validate, text"),
    "a section": ({**LEAST, "validate": {"text": "a", "skip": ["engine"]}}, "wrong value", "did you mean engines?"),
    "a gate": ({**LEAST, "validate": {"text": "a", "gates": {"max_mean_kld": "low"}}}, "not a limit", "max_mean_kld"),
    "a gate that is none": (
        {**LEAST, "validate": {"text": "a", "gates": {"min_same_top": 97}}},
        "a share is at most 1",
        "0.97",
    ),
    "a context": ({**LEAST, "validate": {"text": "a", "context": 1}}, "wrong value", "2 or more"),
    "no repo": ({**LEAST, "push": {"without_report": True}}, "not a repository", "release.yaml, push, repo"),
    "a bad repo": ({**LEAST, "push": {"repo": "a/b/c", "without_report": True}}, "not a repository", "a/b/c"),
    "a revision in it": ({**LEAST, "push": {"repo": "a/b@c", "without_report": True}}, "not a repository", "a/b@c"),
    "a push of what nobody measured": ({**LEAST, "push": {"repo": "a/b"}}, "a push without validation", "push"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    text, what, place = REFUSED[case]
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    assert error.value.what.startswith(what)
    assert place in str(error.value)


def test_a_file_that_is_too_large_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file too large"):
        read(tmp_path, "#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="cannot read a file"):
        read_release(tmp_path / "none.yaml")
    (tmp_path / "release.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="broken YAML"):
        read_release(tmp_path / "release.yaml")


def test_stage_names() -> None:
    assert stage_name("card", "--from") == "card"
    with pytest.raises(StreamquantError, match="did you mean validate") as error:
        stage_name("validation", "--from")
    assert "--from" in str(error.value)
