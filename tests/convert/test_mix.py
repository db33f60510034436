"""llama-quantize's mixes against the golden files of llama.cpp's own test."""

import re
from pathlib import Path

import pytest

from convert.mix import DEFAULTS, MixModel, MixTensor, choose_mix
from quant.formats import FORMATS

MODELS = {"meta-llama-3.1-70b-instruct": "llama", "qwen3-14b": "qwen3", "qwen3-0.6b": "qwen3"}


def read_schema(path: Path) -> tuple[dict[str, int], dict[str, tuple[str, dict[str, str]]]]:
    """(sizes from the head, file type -> (default type, tensor -> other type))."""
    sizes: dict[str, int] = {}
    sections: dict[str, tuple[str, dict[str, str]]] = {}
    current: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            sizes |= {key: int(value) for key, value in re.findall(r"(n_\w+)=(\d+)", line)}
        elif line.startswith("["):
            name, default = re.fullmatch(r"\[(\w+)\] (\w+)", line).groups()  # type: ignore[union-attr]
            current = {}
            sections[name] = (default.upper(), current)
        elif line.strip():
            tensor, other = line.split()
            current[tensor] = other.upper()
    return sizes, sections


def tensors_of(sizes: dict[str, int], *, tied: bool) -> list[MixTensor]:
    n, ff, vocabulary, kv = sizes["n_embd"], sizes["n_ff"], sizes["n_vocab"], 128 * sizes["n_head_kv"]
    query = 128 * sizes["n_head"]
    layer = {
        "attn_q": (query, n),
        "attn_k": (kv, n),
        "attn_v": (kv, n),
        "attn_output": (n, query),
        "ffn_gate": (ff, n),
        "ffn_up": (ff, n),
        "ffn_down": (n, ff),
    }
    tensors = [MixTensor("token_embd.weight", (vocabulary, n))]
    if not tied:
        tensors.append(MixTensor("output.weight", (vocabulary, n)))
    for i in range(sizes["n_layer"]):
        tensors += [MixTensor(f"blk.{i}.{name}.weight", shape) for name, shape in layer.items()]
    return tensors


@pytest.mark.parametrize("file_type", [name for name in DEFAULTS if DEFAULTS[name] in FORMATS])
@pytest.mark.parametrize("name", MODELS)
def test_golden_mixes(name: str, file_type: str, data: Path) -> None:
    sizes, sections = read_schema(data / "mixes" / f"{name}.schema")
    tied = "output.weight" not in sections["Q4_0"][1]
    model = MixModel(MODELS[name], sizes["n_layer"], sizes["n_head"], sizes["n_head_kv"])
    chosen = choose_mix(file_type, reversed(tensors_of(sizes, tied=tied)), model)
    default, others = sections[file_type]
    expected = {tensor: others.get(tensor, default) for tensor in chosen}
    assert expected.keys() >= others.keys()
    assert {tensor: format_ for tensor, (format_, _) in chosen.items()} == expected


def test_shapes_that_do_not_fit_fall_back() -> None:
    model = MixModel("llama", 1, 9, 3)
    tensors = [
        MixTensor("token_embd.weight", (100, 576)),
        MixTensor("blk.0.attn_q.weight", (576, 576)),
        MixTensor("blk.0.ffn_down.weight", (576, 1536)),
        MixTensor("blk.0.ffn_up.weight", (576, 172)),
    ]
    chosen = {name: format_ for name, (format_, _) in choose_mix("Q4_K_M", tensors, model).items()}
    assert chosen == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q5_0",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.0.ffn_up.weight": "F16",
    }
    reasons = dict(choose_mix("Q4_K_M", tensors, model))
    assert "576 columns are not a multiple of Q4_K's 256" in reasons["blk.0.attn_q.weight"][1]
