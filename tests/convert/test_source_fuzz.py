"""Every key of a source's JSON files with values of wrong types: one clear error or success, never a traceback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamquant.convert.options import ConversionOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError
from tests.convert.test_embedding import LAST, write

WRONG: tuple[object, ...] = (
    None, True, 0, -1, 3, 10**400, 1.5, "x", "", [], [None], [{}], [[1]], {}, {"a": 1}, {"content": 3}, {"type": 3},
)  # fmt: skip
TOKENS = ("bos", "eos", "unk", "pad", "cls", "sep")
MORE: dict[str, tuple[str, ...]] = {
    "config.json": (*(f"{kind}_token_id" for kind in TOKENS), "text_config", "auto_map", "quantization_config",
                    "_name_or_path", "rope_parameters", "rope_scaling", "tie_word_embeddings"),
    "tokenizer_config.json": (*(f"{kind}_token" for kind in TOKENS), "add_bos_token", "add_eos_token",
                              "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
                              "extra_special_tokens", "chat_template", "tokenizer_class", "auto_map"),
    "generation_config.json": ("repetition_penalty", "sequence", "mirostat"),
    "special_tokens_map.json": ("bos_token", "extra_special_tokens"),
    "tokenizer.json": (),
    "1_Pooling/config.json": ("pooling_mode", "pooling_mode_mean_tokens"),
}  # fmt: skip
"""File -> keys that the checkpoint here has not."""


def places(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every key, of long objects the first, and the first item of every list."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in list(value)[:12]:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*at, 0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("fuzz") / "model", LAST)
    generation = {"eos_token_id": [1], "temperature": 0.5, "top_k": 3, "top_p": 0.9, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    named = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    return folder


@pytest.mark.parametrize("name", MORE)
def test_wrong_types_are_one_clear_error(source: Path, name: str) -> None:
    path = source / name
    text = path.read_text()
    variants, options = parse_variants(["gguf:Q8_0"]), ConversionOptions(pre="qwen2")
    refused = 0
    try:
        for at in dict.fromkeys([*places(json.loads(text)), *((key,) for key in MORE[name])]):
            for wrong in WRONG:
                content: Any = json.loads(text)
                inner = content
                for key in at[:-1]:
                    inner = inner[key]
                inner[at[-1]] = wrong
                path.write_text(json.dumps(content))
                try:
                    make_plan(open_checkpoint(source), variants, options)
                except StreamquantError:
                    refused += 1
    finally:
        path.write_text(text)
    assert refused > 10
