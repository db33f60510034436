"""llama-quantize's mixes against the golden files of llama.cpp's own test."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from streamquant.convert.recipes.mix import DEFAULTS, MixModel, MixTensor, choose_mix, is_quantized, needs_importance
from streamquant.convert.recipes.recipe import ALIASES, NOT_YET, RECIPES

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


@pytest.mark.parametrize("file_type", DEFAULTS)
@pytest.mark.parametrize("name", MODELS)
def test_golden_mixes(name: str, file_type: str, data: Path) -> None:
    sizes, sections = read_schema(data / "mixes" / f"{name}.schema")
    tied = "output.weight" not in sections["Q4_0"][1]
    model = MixModel(MODELS[name], sizes["n_layer"], sizes["n_head"], sizes["n_head_kv"])
    chosen = choose_mix(file_type, reversed(tensors_of(sizes, tied=tied)), model)
    default, others = sections[file_type]
    expected = {tensor: others.get(tensor, default) for tensor in chosen}
    assert expected.keys() >= others.keys()
    assert {tensor: choice.format for tensor, choice in chosen.items()} == expected


def test_shapes_that_do_not_fit_fall_back() -> None:
    model = MixModel("llama", 1, 9, 3)
    tensors = [
        MixTensor("token_embd.weight", (100, 576)),
        MixTensor("blk.0.attn_q.weight", (576, 576)),
        MixTensor("blk.0.ffn_down.weight", (576, 1536)),
        MixTensor("blk.0.ffn_up.weight", (576, 172)),
    ]
    chosen = {name: choice.format for name, choice in choose_mix("Q4_K_M", tensors, model).items()}
    assert chosen == {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "Q5_0",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.0.ffn_up.weight": "F16",
    }
    choices = choose_mix("Q4_K_M", tensors, model)
    assert "576 columns are not a multiple of Q4_K's 256" in choices["blk.0.attn_q.weight"].reason


def chosen_of(
    file_type: str, model: MixModel, names: Mapping[str, tuple[int, ...]], *, imatrix: bool = False
) -> dict[str, str]:
    tensors = [MixTensor(name, shape) for name, shape in names.items()]
    return {name: choice.format for name, choice in choose_mix(file_type, tensors, model, imatrix=imatrix).items()}


def layers_with(file_type: str, name: str, format_: str, *, model: MixModel, imatrix: bool = False) -> list[int]:
    """The layers of a 16-layer model in which a tensor of this kind has this format."""
    names = {f"blk.{i}.{name}.weight": (256, 256) for i in range(16)} | {"output.weight": (256, 256)}
    chosen = chosen_of(file_type, model, names, imatrix=imatrix)
    return [i for i in range(16) if chosen[f"blk.{i}.{name}.weight"] == format_]


LLAMA, MIXTRAL, FALCON = MixModel("llama", 16, 8, 2), MixModel("llama", 16, 8, 2, 8), MixModel("falcon", 16, 8, 2)
ALL, EIGHTH, MORE = list(range(16)), [0, 1], [0, 1, 4, 7, 10, 13, 14, 15]


@pytest.mark.parametrize(
    ("file_type", "name", "format_", "without", "with_matrix"),
    [
        ("Q4_0", "ffn_down", "Q4_1", [], EIGHTH),
        ("Q5_0", "ffn_down", "Q5_1", [], EIGHTH),
        ("IQ4_NL", "ffn_down", "Q5_K", EIGHTH, []),
        ("IQ4_XS", "ffn_down", "Q5_K", EIGHTH, []),
        ("IQ3_XXS", "ffn_down", "Q4_K", EIGHTH, []),
        ("IQ3_XXS", "ffn_down", "IQ3_XXS", [], ALL),
        ("Q4_K_M", "ffn_down", "Q6_K", MORE, MORE),
        ("Q4_1", "ffn_down", "Q4_1", ALL, ALL),
    ],
)
def test_what_an_importance_matrix_changes(
    file_type: str, name: str, format_: str, without: list[int], with_matrix: list[int]
) -> None:
    assert layers_with(file_type, name, format_, model=LLAMA) == without
    assert layers_with(file_type, name, format_, model=LLAMA, imatrix=True) == with_matrix


def test_iq3_xxs_without_grouped_queries_asks_for_the_matrix() -> None:
    wide = MixModel("llama", 16, 8, 8)
    assert layers_with("IQ3_XXS", "attn_v", "IQ3_S", model=wide) == ALL
    assert layers_with("IQ3_XXS", "attn_v", "IQ3_XXS", model=wide, imatrix=True) == ALL
    assert layers_with("IQ3_XXS", "attn_v", "Q4_K", model=LLAMA, imatrix=True) == ALL


@pytest.mark.parametrize(
    ("file_type", "name", "format_"),
    [
        ("Q4_K_M", "attn_v", "Q8_0"),
        ("Q4_K_M", "attn_k", "Q8_0"),
        ("Q4_K_M", "attn_output", "Q5_K"),
        ("Q2_K", "attn_output", "Q5_K"),
        ("Q3_K_L", "attn_output", "Q3_K"),
        ("Q5_K_M", "attn_output", "Q5_K"),
        ("Q6_K", "attn_output", "Q6_K"),
        ("Q4_0", "attn_output", "Q4_0"),
        ("Q4_0", "attn_v", "Q8_0"),
        ("IQ4_XS", "attn_output", "Q5_K"),
        ("IQ3_XS", "attn_k", "Q8_0"),
        ("IQ2_XS", "attn_v", "Q4_K"),
        ("IQ2_XS", "attn_k", "Q4_K"),
        ("IQ1_S", "attn_output", "Q5_K"),
        ("IQ3_XS", "attn_q", "IQ3_XXS"),
    ],
)
def test_eight_experts(file_type: str, name: str, format_: str) -> None:
    assert layers_with(file_type, name, format_, model=MIXTRAL) == ALL


def test_layers_of_experts_are_read_from_their_names() -> None:
    """Two tensors a layer would be counted twice; and a missing layer is not counted."""
    names = {f"blk.{i}.ffn_down.{e}.weight": (256, 256) for i in range(1, 16) for e in (0, 1)}
    names |= {"output.weight": (256, 256)}
    chosen = chosen_of("Q4_K_M", MixModel("llama", 16, 8, 2, 2), names)
    assert [i for i in range(1, 16) if chosen[f"blk.{i}.ffn_down.1.weight"] == "Q6_K"] == [i for i in MORE if i]
    down = {f"blk.{i}.ffn_down_exps.weight": (4, 256, 256) for i in range(2, 16)} | {"output.weight": (256, 256)}
    few = chosen_of("IQ2_XS", MixModel("llama", 16, 8, 2, 4), down)
    counted = [i for i in range(2, 16) if few[f"blk.{i}.ffn_down_exps.weight"] == "Q2_K"]
    assert counted == [2, 3], "the lowest types count what they have seen"


def test_iq3_m_gives_eight_experts_more() -> None:
    assert layers_with("IQ3_M", "ffn_down", "Q4_K", model=LLAMA) == EIGHTH
    assert layers_with("IQ3_M", "ffn_down", "Q4_K", model=MIXTRAL) == MORE


def test_four_experts_count_as_grouped_for_the_lowest_types() -> None:
    wide = MixModel("llama", 16, 8, 8)
    assert layers_with("IQ2_M", "attn_v", "IQ3_S", model=wide) == ALL
    assert layers_with("IQ2_M", "attn_v", "Q4_K", model=MixModel("llama", 16, 8, 8, 4)) == ALL
    assert layers_with("Q2_K", "attn_v", "Q3_K", model=MixModel("llama", 16, 8, 8, 4)) == ALL


def test_mxfp4_is_for_experts() -> None:
    names: dict[str, tuple[int, ...]] = {
        "blk.0.ffn_up_exps.weight": (4, 256, 256),
        "blk.0.ffn_down_exps.weight": (4, 256, 256),
        "blk.0.attn_q.weight": (256, 256),
        "token_embd.weight": (512, 256),
        "output.weight": (512, 256),
        "blk.0.ffn_gate_inp.weight": (4, 256),
        "blk.0.attn_norm.weight": (256,),
    }
    assert chosen_of("MXFP4_MOE", MixModel("llama", 1, 8, 2, 4), names) == {
        "blk.0.ffn_up_exps.weight": "MXFP4",
        "blk.0.ffn_down_exps.weight": "MXFP4",
        "blk.0.attn_q.weight": "Q8_0",
        "token_embd.weight": "Q8_0",
        "output.weight": "Q8_0",
    }


@pytest.mark.parametrize("file_type", ["TQ1_0", "TQ2_0"])
def test_ternary_types_keep_the_ends(file_type: str) -> None:
    names = {"token_embd.weight": (512, 256), "output.weight": (512, 256), "blk.0.attn_v.weight": (256, 256)}
    chosen = chosen_of(file_type, LLAMA, names)
    assert chosen == {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", "blk.0.attn_v.weight": file_type}
    assert chosen_of(file_type, LLAMA, {"blk.0.ffn_up.weight": (256, 96)}) == {"blk.0.ffn_up.weight": "Q4_0"}


def test_falcon_has_rules_of_its_own() -> None:
    assert layers_with("Q4_K_M", "ffn_down", "Q6_K", model=FALCON) == [0]
    assert layers_with("Q4_K_M", "ffn_down", "Q5_K", model=FALCON) == MORE[1:]
    assert layers_with("Q4_K_S", "ffn_down", "Q5_K", model=FALCON) == []
    assert layers_with("Q3_K_M", "ffn_down", "Q4_K", model=FALCON) == MORE[1:]
    assert layers_with("Q3_K_M", "attn_output", "Q3_K", model=FALCON) == ALL
    assert layers_with("Q3_K_L", "attn_output", "Q4_K", model=FALCON) == ALL
    assert chosen_of("Q4_K_M", FALCON, {"output.weight": (512, 256)}) == {"output.weight": "Q8_0"}


def test_fused_attention_counts_as_attn_v() -> None:
    assert layers_with("Q4_K_M", "attn_qkv", "Q6_K", model=LLAMA) == MORE
    assert layers_with("Q3_K_M", "attn_kv_b", "Q5_K", model=LLAMA) == [0, 1]


@pytest.mark.parametrize(
    ("arch", "layers", "heads", "large"),
    [
        ("llama", 80, (64, 8), True),
        ("llama", 80, (64, 64), False),
        ("llama", 126, (128, 8), False),
        ("qwen2", 80, (64, 8), True),
        ("qwen3", 80, (64, 8), False),
        ("deci", 80, (64, 8), True),
        ("jais2", 68, (64, 64), True),
    ],
)
def test_which_models_are_70b(arch: str, layers: int, heads: tuple[int, int], large: bool) -> None:
    assert MixModel(arch, layers, *heads).is_70b == large


@pytest.mark.parametrize(
    ("name", "shape", "quantized"),
    [
        ("blk.0.attn_q.weight", (256, 256), True),
        ("token_embd.weight", (8, 256), True),
        ("blk.0.attn_q.bias", (256,), False),
        ("blk.0.attn_norm.weight", (256,), False),
        ("blk.0.attn_q_norm.weight", (8, 32), False),
        ("blk.0.ffn_gate_inp.weight", (8, 256), False),
        ("blk.0.ssm_conv1d.weight", (256, 4), False),
        ("blk.0.time_mix_lerp_fused.weight", (5, 256), False),
        ("position_embd.weight", (512, 256), False),
        ("blk.0.ffn_up.scale", (256, 256), False),
        ("blk.0.ffn_up.weight", (1, 256), False),
        ("blk.0.ffn_up_exps.weight", (4, 1, 256), True),
    ],
)
def test_what_is_quantized_at_all(name: str, shape: tuple[int, ...], quantized: bool) -> None:
    assert is_quantized(MixTensor(name, shape)) == quantized


def test_what_needs_importance() -> None:
    assert needs_importance("Q2_K_S", "blk.0.attn_q.weight", "Q2_K")
    assert not needs_importance("Q2_K", "blk.0.attn_q.weight", "Q2_K")
    assert not needs_importance("Q2_K_S", "blk.0.attn_q.weight", "Q4_K")
    assert not needs_importance("Q2_K_S", "token_embd.weight", "Q2_K")
    for format_ in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"):
        assert needs_importance("Q4_K_M", "blk.0.attn_q.weight", format_)
        assert not needs_importance("Q4_K_M", "output.weight", format_)
    assert not needs_importance("IQ3_S", "blk.0.attn_q.weight", "IQ3_S")


def test_every_file_type_is_made_or_refused() -> None:
    assert NOT_YET.keys() == {name for name in DEFAULTS if name.startswith(("IQ1", "IQ2", "IQ3"))}
    assert DEFAULTS.keys() - NOT_YET.keys() <= {recipe.label for recipe in RECIPES.values()}
    assert {ALIASES[number] for number in ("0", "1", "2", "7", "15", "21", "30", "32", "36", "38")} == {
        *("F32", "F16", "Q4_0", "Q8_0", "Q4_K_M", "Q2_K_S", "IQ4_XS", "BF16", "TQ1_0", "MXFP4_MOE")
    }
