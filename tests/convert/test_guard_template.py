"""--guard-template: guarded templates reach every variant, and nothing else changes."""

import json
from pathlib import Path

import pytest

from streamquant.convert.conversion import convert
from streamquant.convert.metadata.guard_template import bos_text, guard_side_file, guard_template
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.gguf_file import read_header
from streamquant.quant.errors import StreamquantError
from streamquant.validate.readback.verify import verify
from tests.attacks.harness import edit_json, write_model

FAULTY = (
    "{{ bos_token }}{% for m in messages %}{% set c = m.content %}"
    "{%- if thinking %}{% set c = '<think> </think>' + c.split('</think>', 1)[1] %}{%- endif %}{{ c }}{% endfor %}"
)
BOS = '"'  # token 1, which config.json names
GUARDED = guard_template(FAULTY, BOS)
VARIANTS = ["gguf:Q8_0", "fp8-dynamic"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "Tiny", shards=1)
    edit_json(folder / "tokenizer_config.json", chat_template=FAULTY, bos_token=BOS)
    (folder / "chat_template.jinja").write_text(FAULTY)
    return folder


@pytest.fixture(autouse=True)
def _known_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "streamquant.convert.recipes.quantization_config._read_cache", lambda scheme: {"config_groups": {scheme: {}}}
    )


def templates(out: Path) -> list[str]:
    """Of the GGUF, of tokenizer_config.json, and of chat_template.jinja."""
    gguf = read_header(out / "Tiny-GGUF" / "Tiny-Q8_0.gguf").metadata["tokenizer.chat_template"]
    folder = out / "Tiny-FP8-dynamic"
    inside = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    return [gguf, inside, (folder / "chat_template.jinja").read_text()]


def test_every_template_is_guarded_and_nothing_else_changes(model: Path, tmp_path: Path) -> None:
    assert len(GUARDED.changes) == 2
    for guard, expected in ((True, GUARDED.text), (False, FAULTY)):
        out = tmp_path / f"out-{guard}"
        convert(
            make_plan(open_checkpoint(model), parse_variants(VARIANTS), ConversionOptions(guard_template=guard)),
            out,
            RunOptions(jobs=1),
        )
        assert templates(out) == [expected] * 3
    plain, guarded = tmp_path / "out-False", tmp_path / "out-True"
    for path in sorted((plain / "Tiny-FP8-dynamic").iterdir()):
        same = path.read_bytes() == (guarded / "Tiny-FP8-dynamic" / path.name).read_bytes()
        assert same == (path.name not in ("tokenizer_config.json", "chat_template.jinja", "streamquant.json")), path
    settings = [json.loads((o / "Tiny-FP8-dynamic" / "tokenizer_config.json").read_text()) for o in (plain, guarded)]
    for found in settings:
        del found["chat_template"]
    assert settings[0] == settings[1]
    for out in (plain, guarded):
        assert [result.problems for result in verify(out, open_checkpoint(model))] == [[], []]


def test_the_plan_says_what_changed(model: Path) -> None:
    recipes = parse_variants(VARIANTS)
    notes = make_plan(open_checkpoint(model), recipes, ConversionOptions(guard_template=True)).notes
    assert [note for note in notes if note.startswith("tokenizer.chat_template: ")] == [
        f"tokenizer.chat_template: {change}" for change in GUARDED.changes
    ]


def test_a_variant_with_another_template_is_not_the_same(model: Path) -> None:
    recipes = parse_variants(["fp8-dynamic"])
    plans = [
        make_plan(open_checkpoint(model), recipes, ConversionOptions(guard_template=guard)) for guard in (True, False)
    ]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_named_templates_and_other_files() -> None:
    named = {
        "chat_template": [{"name": "default", "template": FAULTY}, {"name": "tools", "template": "{{ x }}"}],
        "a": 1,
    }
    found = json.loads(guard_side_file("tokenizer_config.json", json.dumps(named).encode(), BOS))
    assert found["chat_template"] == [{"name": "default", "template": GUARDED.text}, named["chat_template"][1]]  # type: ignore[index]
    assert found["a"] == 1
    assert guard_side_file("additional_chat_templates/rag.jinja", FAULTY.encode(), BOS).decode() == GUARDED.text
    for name, content in (
        ("README.md", FAULTY.encode()),
        ("tokenizer_config.json", b'{ "chat_template" : "{{ x }}" }'),
        ("chat_template.json", b"[1]"),
    ):
        assert guard_side_file(name, content, "<s>") == content


def test_the_text_of_bos() -> None:
    assert bos_text({"bos_token": "<s>"}) == bos_text({"bos_token": {"content": "<s>"}}) == "<s>"
    assert bos_text({"bos_token": None}) is None
    assert bos_text({}) is None


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(StreamquantError, match="not a text file"):
        guard_side_file("chat_template.jinja", b"\xff\xfe", None)
