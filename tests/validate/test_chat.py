import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue
from rich.console import Console

from streamquant.convert.metadata.guard_template import guard_template
from streamquant.model.variants.open import open_variant
from streamquant.validate.engines.engine import TemplateRequest
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.report.console import chat_view
from streamquant.validate.report.make import measured_numbers
from streamquant.validate.text.chat import compare_chat, expected_chat, read_template
from streamquant.validate.text.chat_suite import CONVERSATIONS, chat_cases
from streamquant.validate.validation import chat_check
from tests.peers import requires_llama_cpp
from tests.validate.engine_fixtures import Model, with_keys

pytestmark = requires_llama_cpp
TEMPLATE = "tokenizer.chat_template"


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def test_the_suite_has_every_setting_and_is_plain_json() -> None:
    cases = list(chat_cases())
    assert len(cases) == len(CONVERSATIONS) * 6 * 2
    assert len({case.name for case in cases}) == len(cases)
    assert json.loads(json.dumps([asdict(case) for case in cases]))


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_a_gguf_shows_what_the_original_shows(name: str, request: pytest.FixtureRequest) -> None:
    source, variant = (request.getfixturevalue(f"{name}_{kind}") for kind in ("source", "gguf"))
    report = compare_chat(source, variant)
    assert report.problems == ()
    assert report.template_equal
    assert report.agreeing >= 290
    # what differs is llama.cpp's: bug 1, arguments that it parses, and Unicode that it does not normalize
    assert {item.cause for item in report.differences} == {"engine"}
    assert any("thinking=True" in item.case and item.kind == "error" for item in report.differences)
    assert json.loads(json.dumps(asdict(report)))["cases"] == 360


def test_bug_1_is_real_in_both_engines(llama_source: EngineProcess, llama_gguf: EngineProcess) -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "plain"})
    asked = [TemplateRequest(messages, (), {"thinking": True})]
    (ours,), (theirs,) = llama_source.apply_template(asked), llama_gguf.apply_template(asked)
    assert "UndefinedError" in (ours.error or "")
    assert theirs.error is None
    assert "plain" not in theirs.text
    assert theirs.text.count("<|begin_of_text|>") == 1
    assert "<think> </think><|eot_id|>" in theirs.text


def test_the_template_of_an_fp8_folder(llama_source: EngineProcess, hermes_llama: Model, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(hermes_llama.fp8, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    changed = (folder / "chat_template.jinja").read_text().replace("# Tools", "# tools")
    (folder / "chat_template.jinja").write_text(changed)
    with EngineProcess(folder, tokenizer_only=True) as variant:
        report = compare_chat(llama_source, variant)
    assert report.template_equal is False
    first = report.differences[0]
    assert (first.kind, first.cause) == ("text", "file")
    assert "# Tools" in first.expected
    assert "# tools" in first.found
    assert "cases differ; first 'tools'" in report.problems[0]
    # all cases without tools are the same
    assert report.agreeing == 180
    assert report.failing > 0
    assert len(report.differences) + report.agreeing + report.failing == report.cases


def faulty(model: Model, fault: str, data: Path) -> dict[str, GGUFValue | None]:
    metadata = model.metadata
    if fault == "another family's template":
        return {TEMPLATE: text((data / "templates" / "hermes4_chatml.jinja").read_text())}
    if fault == "no template":
        return {TEMPLATE: None}
    if fault == "one letter":
        return {TEMPLATE: text(metadata[TEMPLATE].replace("created by Nous", "Created by Nous"))}
    types = list(metadata["tokenizer.ggml.token_type"])
    types[metadata["tokenizer.ggml.tokens"].index("<|eot_id|>")] = int(TokenType.NORMAL)
    return {"tokenizer.ggml.token_type": GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32)}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("another family's template", "text"),
        pytest.param("no template", "text", marks=pytest.mark.long),
        pytest.param("one letter", "text", marks=pytest.mark.long),
        ("type of <|eot_id|>", None),
    ],
)
def test_planted_faults_are_found(
    fault: str, kind: str | None, llama_source: EngineProcess, hermes_llama: Model, data: Path, tmp_path: Path
) -> None:
    broken = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", faulty(hermes_llama, fault, data))
    cases = list(chat_cases(CONVERSATIONS[:4]))
    with EngineProcess(broken, tokenizer_only=True) as variant:
        report = compare_chat(llama_source, variant, expected_chat(llama_source, cases))
    wrong = [item for item in report.differences if item.cause == "file"]
    if kind is None:  # llama.cpp knows <|eot_id|> by its text and mends its type: nothing to find here
        assert not wrong
        return
    assert wrong
    assert wrong[0].kind == kind
    assert report.problems


def test_a_flipped_bos_flag_is_found(qwen_source: EngineProcess, hermes_14b: Model, tmp_path: Path) -> None:
    keys = {
        "tokenizer.ggml.add_bos_token": GGUFValue(True, GGUFValueType.BOOL),
        "tokenizer.ggml.bos_token_id": GGUFValue(151643, GGUFValueType.UINT32),
    }
    broken = with_keys(hermes_14b.gguf, tmp_path / "x.gguf", keys)
    with EngineProcess(broken, tokenizer_only=True) as variant:
        report = compare_chat(qwen_source, variant, expected_chat(qwen_source, list(chat_cases(CONVERSATIONS[:2]))))
    assert report.agreeing == 0
    assert report.differences[0].cause == "file"
    assert report.differences[0].found.startswith("<|endoftext|><|im_start|>")
    assert report.problems[0].startswith("text: 24 of 24 cases differ")


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content ", pytest.param(ALTERNATE, marks=pytest.mark.long)]
)
def test_chats_that_the_original_cannot_render_are_counted_apart(
    template: str, hermes_14b: Model, tmp_path: Path
) -> None:
    folders = [tmp_path / "original", tmp_path / "variant"]
    for folder, model in zip(folders, (hermes_14b.source, hermes_14b.fp8), strict=True):
        shutil.copytree(model, folder)
        (folder / "chat_template.jinja").write_text(template)
    found = chat_check(open_variant(folders[0]), folders[1:])
    (variant,) = found.variants
    assert variant.chat is not None
    assert variant.chat.right + variant.chat.original_fails == variant.chat.cases == 360
    assert (variant.chat.wrong, variant.errors) == (0, 0)
    numbers = measured_numbers(variant, None)
    console = Console(width=250)
    with console.capture() as shown:
        console.print(chat_view(found))
    if template is ALTERNATE:
        # conversations of user and assistant in turn, none of which has a system prompt or a tool's result
        alternating = sum(
            all((message["role"] == "user") == (at % 2 == 0) for at, message in enumerate(talk.messages))
            for talk in CONVERSATIONS
        )
        assert 0 < variant.chat.right == alternating * 12 < 360
        assert f"{variant.chat.right} of 360, {variant.chat.original_fails} fail in the original too" in shown.get()
        assert numbers["chat mismatches"] == 0
    else:
        assert variant.chat.right == 0
        assert "0 of 360, 360 fail in the original too" in shown.get()
        assert "not checked: chat templates" in shown.get()
        assert numbers["chat mismatches"] is None  # what was not measured passes no gate
        assert "fails" in {lint.name for lint in found.original_lints}


def test_a_mended_template_is_a_warning(llama_source: EngineProcess, hermes_llama: Model, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(hermes_llama.fp8, folder)
    template = folder / "chat_template.jinja"
    template.write_text(guard_template(template.read_text(), "<|begin_of_text|>").text)
    found = chat_check(open_variant(hermes_llama.source), [folder])
    (variant,) = found.variants
    assert variant.chat is not None
    assert (variant.chat.wrong, variant.chat.original_fails, variant.chat.right) == (0, 48, 312)
    assert [(problem.check, problem.severity) for problem in variant.problems] == [("chat", "warning")]


@pytest.mark.parametrize("name", ["hermes4_llama3", "hermes4_chatml"])
def test_guarded_templates_behave_as_the_published_ones(name: str, llama_source: EngineProcess, data: Path) -> None:
    plain, published = ((data / "templates" / f"{name}{kind}.jinja").read_text() for kind in ("", ".guarded"))
    guarded = guard_template(plain, "<|begin_of_text|>" if name == "hermes4_llama3" else None)
    assert len(guarded.changes) == (2 if name == "hermes4_llama3" else 1)
    assert guard_template(guarded.text, "<|begin_of_text|>").changes == ()
    assert guard_template(published, "<|begin_of_text|>").changes == ()
    requests = [case.request for case in chat_cases()]
    specials: tuple[dict[str, str] | None, ...] = (None, {})
    for special in specials:
        mine, theirs = (llama_source.render(template, requests, special) for template in (guarded.text, published))
        assert mine == theirs
        assert [item.error for item in mine] == [None] * len(mine)
    before, after = (llama_source.render(template, requests) for template in (plain, guarded.text))
    assert all(old == new for old, new in zip(before, after, strict=True) if old.error is None)
    assert sum(old.error is not None for old in before) == 48


def test_a_guarded_template_agrees_in_llama_cpp(
    llama_source: EngineProcess, hermes_llama: Model, tmp_path: Path
) -> None:
    template = guard_template(read_template(hermes_llama.source) or "", "<|begin_of_text|>").text
    guarded = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", {TEMPLATE: text(template)})
    requests = [case.request for case in chat_cases() if "compact" not in case.name]
    with EngineProcess(guarded, tokenizer_only=True) as variant:
        found = [item.text for item in variant.apply_template(requests)]
    assert found == [item.text for item in llama_source.render(template, requests)]


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = content.split('</think>')[-1] %}",
        "{{ bos_token if bos_token is defined else '' }}",
        "{%- if '</think>' in c %}{%- set c = c.split('</think>')[1] %}{%- endif %}",
        "plain",
    ],
)
def test_what_needs_no_guard_stays(template: str) -> None:
    assert guard_template(template, "<s>").text == template


def test_a_guard_of_other_spellings() -> None:
    found = guard_template('{% set c = message["content"].split("</think>")[1].strip() %}', "it's")
    assert re.match(r"{% if '</think>' in message\[\"content\"\] %}{% set .*%}{%- endif %}", found.text)
