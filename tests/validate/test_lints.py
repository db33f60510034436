import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue

from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.text.template_lints import LINTS, Lint, lint_checkpoint, lint_gguf
from tests.validate.engine_fixtures import Model, with_keys


def names(lints: list[Lint]) -> set[str]:
    assert all(lint.consequence and lint.fix and lint.found for lint in lints)
    assert all(lint.name in {*LINTS, "no-template"} for lint in lints)
    return {lint.name for lint in lints}


def test_the_known_bugs_of_hermes_4(
    llama_source: EngineProcess, qwen_source: EngineProcess, hermes_llama: Model, hermes_14b: Model
) -> None:
    chatml = {"thought-split", "empty-assistant"}
    llama = chatml | {"bos-undefined", "double-bos"}
    assert names(lint_checkpoint(llama_source)) == llama
    assert names(lint_gguf(hermes_llama.gguf, llama_source)) == llama
    assert names(lint_checkpoint(qwen_source)) == chatml
    assert names(lint_gguf(hermes_14b.gguf, qwen_source)) == chatml


def changed(model: Model, fault: str, data: Path) -> Mapping[str, GGUFValue | None]:
    metadata = model.metadata
    types = list(metadata["tokenizer.ggml.token_type"])
    types[metadata["tokenizer.ggml.tokens"].index("<tool_call>")] = int(TokenType.CONTROL)
    other = (data / "templates" / "hermes4_chatml.jinja").read_text()
    guarded = (data / "templates" / "hermes4_llama3.guarded.jinja").read_text()
    unknown = guarded.replace("<|eot_id|>", "<|reserved_special_token_9|>")
    return {
        "special-tags": {"tokenizer.ggml.token_type": GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32)},
        "wrong-family": {"tokenizer.chat_template": GGUFValue(other, GGUFValueType.STRING)},
        "stop-token": {"tokenizer.chat_template": GGUFValue(unknown, GGUFValueType.STRING)},
        "sampling-defaults": {"general.sampling.temp": None},
        "no-template": {"tokenizer.chat_template": None},
        "fails": {"tokenizer.chat_template": GGUFValue("{{ nothing.at.all }}", GGUFValueType.STRING)},
    }[fault]


@pytest.mark.parametrize(
    "fault", ["special-tags", "wrong-family", "stop-token", "sampling-defaults", "no-template", "fails"]
)
def test_faults_of_a_gguf(
    fault: str, llama_source: EngineProcess, hermes_llama: Model, data: Path, tmp_path: Path
) -> None:
    broken = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", changed(hermes_llama, fault, data))
    assert fault in names(lint_gguf(broken, llama_source))


TALK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or () %}ARGUMENTS{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            "{% for key, value in call.function.arguments | items %}{{ key }}={{ value }}{% endfor %}",
            "string-arguments",
        ),
        ("{{ call.function.arguments | tojson }}", "string-arguments"),
        ("{{ call.function.arguments }}", "mapping-arguments"),
        ("{{ '' + call.function.arguments }}", "mapping-arguments"),
        (
            "{% set a = call.function.arguments %}{{ a if a is string else a | tojson }}",
            None,
        ),
        ("", None),
    ],
)
def test_the_forms_of_arguments(
    arguments: str, found: str | None, qwen_source: EngineProcess, hermes_14b: Model, tmp_path: Path
) -> None:
    """Only one of the two forms that histories have can be rendered."""
    keys = {"tokenizer.chat_template": GGUFValue(TALK.replace("ARGUMENTS", arguments), GGUFValueType.STRING)}
    file = with_keys(hermes_14b.gguf, tmp_path / "x.gguf", keys)
    kinds = {"string-arguments", "mapping-arguments"}
    assert names(lint_gguf(file, qwen_source)) & kinds == ({found} if found else set())


def test_guarded_templates_have_neither_fault(
    llama_source: EngineProcess, hermes_llama: Model, data: Path, tmp_path: Path
) -> None:
    guarded = (data / "templates" / "hermes4_llama3.guarded.jinja").read_text()
    keys = {"tokenizer.chat_template": GGUFValue(guarded, GGUFValueType.STRING)}
    mended = with_keys(hermes_llama.gguf, tmp_path / "x.gguf", keys)
    assert names(lint_gguf(mended, llama_source)) == {"double-bos", "empty-assistant"}


def test_faults_of_a_folder(hermes_llama: Model, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hermes_llama.source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        added = content.get("added_tokens") or [*content["added_tokens_decoder"].values()]
        for token in added:
            token["special"] |= token["content"] == "</think>"
        if name == "tokenizer_config.json":
            content.pop("bos_token")
            content["chat_template"] = "{{ messages }}"
        (folder / name).write_text(json.dumps(content))
    (folder / "special_tokens_map.json").unlink()
    with EngineProcess(folder, tokenizer_only=True) as engine:
        lints = lint_checkpoint(engine)
    found = {"special-tags", "bos-undefined", "two-templates", "sampling-defaults"}
    assert found <= names(lints)
    assert next(lint for lint in lints if lint.name == "bos-undefined").severity == "error"
