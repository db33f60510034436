"""convert/architectures against llama.cpp's converter and against transformers, and its error messages."""

import dataclasses
import json
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamquant.convert.architectures import (
    ARCHITECTURES,
    ExtraTensor,
    ModelDescription,
    TensorKind,
    describe,
)
from streamquant.convert.architectures.tensor_view import resolve, rope_view
from streamquant.quant.errors import StreamquantError
from tests import gguf_peer, synthetic
from tests.gguf_peer import KeyValue, Tensor, requires_converter

LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
LLAMA_LIKE = (LLAMA, MISTRAL)
Setting = dict[str, Any]


def supported_ropes(architecture: str) -> list[str]:
    return [rope for rope in synthetic.ROPE if rope != "llama3" or architecture in LLAMA_LIKE]


# Name -> arguments of write_checkpoint. Each is converted once by the reference, all of them in one process.
CASES: dict[str, Setting] = {
    f"{architecture}-{rope}-{style}": {"architecture": architecture, "rope": rope, "config_style": style}
    for architecture in synthetic.ARCHITECTURES
    for rope in supported_ropes(architecture)
    for style in ("v4", "v5")
}
CASES |= {
    f"{architecture}-defaults": {
        "architecture": architecture,
        "config_style": style,
        "rope_theta": ...,
        "rope_parameters": ...,
        "rms_norm_eps": ...,
        "max_position_embeddings": ...,
        "tie_word_embeddings": ...,
        "sliding_window": ...,
        "head_dim": ...,
    }
    for architecture, style in zip(synthetic.ARCHITECTURES, ("v4", "v5", "v4", "v5", "v4"), strict=True)
}
CASES |= {f"{a}-tied": {"architecture": a, "tied": True} for a in synthetic.ARCHITECTURES}
CASES |= {f"{a}-wide-heads": {"architecture": a, "head_dim": 48} for a in synthetic.ARCHITECTURES}
CASES |= {
    f"{LLAMA}-rope_freqs-{head_dim}-{factor}": {
        "architecture": LLAMA,
        "head_dim": head_dim,
        "rope": {**synthetic.ROPE["llama3"], "factor": factor, "rope_theta": 500000.0},
    }
    for head_dim in (64, 128)
    for factor in (8.0, 32.0)
}
CASES |= {
    # A context that is no power of two tells a / b from a * (1 / b).
    f"{LLAMA}-rope_freqs-odd-context": {
        "architecture": LLAMA,
        "head_dim": 128,
        "rope": {
            **synthetic.ROPE["llama3"],
            "factor": 8.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 24000,
            "rope_theta": 500000.0,
        },
    },
    f"{LLAMA}-tied-with-head": {"architecture": LLAMA, "tied": True, "duplicate_head": True},
    f"{LLAMA}-biases": {"architecture": LLAMA, "attention_bias": True, "mlp_bias": True},
    f"{LLAMA}-multi-head": {"architecture": LLAMA, "num_key_value_heads": 4},
    f"{LLAMA}-kv-null": {"architecture": LLAMA, "num_key_value_heads": None, "config_style": "v4"},
    f"{LLAMA}-head_dim-null": {"architecture": LLAMA, "head_dim": None},
    f"{LLAMA}-integers": {"architecture": LLAMA, "rope": {"rope_theta": 10000}, "rms_norm_eps": 1e-6},
    f"{LLAMA}-shards": {"architecture": LLAMA, "shards": 3, "num_hidden_layers": 11},
    f"{LLAMA}-f32": {"architecture": LLAMA, "dtype": "F32"},
    f"{LLAMA}-type": {
        "architecture": LLAMA,
        "config_style": "v4",
        "rope_scaling": {"type": "linear", "factor": 2},
    },
    f"{LLAMA}-two-thetas": {"architecture": LLAMA, "rope_theta": 7.0},
    f"{MISTRAL}-window": {"architecture": MISTRAL, "sliding_window": 4096},
    f"{QWEN2}-window": {"architecture": QWEN2, "use_sliding_window": True, "sliding_window": 1024},
    f"{QWEN3}-biases": {"architecture": QWEN3, "attention_bias": True},
    f"{SEED_OSS}-biases": {"architecture": SEED_OSS, "attention_out_bias": True, "mlp_bias": True},
    f"{SEED_OSS}-no-bias": {"architecture": SEED_OSS, "attention_bias": False},
    f"{SEED_OSS}-head_dim-null": {"architecture": SEED_OSS, "head_dim": None},
    f"{QWEN2}-yarn-all": {
        "architecture": QWEN2,
        "rope": {
            **synthetic.ROPE["yarn"],
            "attention_factor": 1.25,
            "beta_fast": 30.0,
            "beta_slow": 2.0,
            "extrapolation_factor": 0.5,
            "truncate": True,
        },
    },
    **{
        f"{name}-context-outside": {"architecture": name, "rope": rope, "original_max_position_embeddings": 4096}
        for name, rope in (
            (QWEN2, {"rope_type": "yarn", "factor": 2.0}),
            (QWEN3, {**synthetic.ROPE["yarn"], "original_max_position_embeddings": 2048}),
            (LLAMA, synthetic.ROPE["llama3"]),
            (MISTRAL, {"rope_type": "default"}),
        )
    },
    f"{QWEN2}-mrope": {"architecture": QWEN2, "rope": {"type": "default", "mrope_section": [16, 24, 24]}},
    f"{QWEN3}-mrope": {
        "architecture": QWEN3,
        "config_style": "v4",
        "rope": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
    f"{QWEN3}-yarn-old-names": {
        "architecture": QWEN3,
        "config_style": "v4",
        "rope": {"rope_type": "yarn", "factor": 2, "attn_factor": 1.5, "beta_fast": None},
    },
    f"{QWEN3}-yarn-null-wins": {
        "architecture": QWEN3,
        "rope": {**synthetic.ROPE["yarn"], "attention_factor": None, "attn_factor": 1.5},
    },
}
# With a real tokenizer, through the command line that users run, and through the driver.
TOKENIZED: dict[str, tuple[str, Setting]] = {
    "hermes4-llama": ("", {"architecture": LLAMA, "rope": "llama3", "config_style": "v4"}),
    "hermes4-14b": ("qwen2", {"architecture": QWEN3, "config_style": "v4"}),
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case's checkpoint, and beside it what the reference converter makes of it."""
    folder = tmp_path_factory.mktemp("architectures")
    jobs = []
    for name, setting in CASES.items():
        synthetic.write_checkpoint(folder / name, **setting)
        jobs.append(gguf_peer.Job(str(folder / name), "f32", str(folder / f"{name}.gguf"), vocabulary=False))
    gguf_peer.convert_many(jobs)
    return folder


def read_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def read_checkpoint(folder: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a folder as float32."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__")
        for name, entry in header.items():
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = widen(content[first:last], entry["dtype"]).reshape(entry["shape"])
    return tensors


def widen(content: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def arch_metadata(keys: Mapping[str, KeyValue], arch: str) -> dict[str, KeyValue]:
    return {key: value for key, value in keys.items() if key.startswith(f"{arch}.")}


def as_stored(description: ModelDescription) -> dict[str, KeyValue]:
    """The described metadata as GGUFReader gives it back."""
    return {
        key: (
            (value.type,) if value.sub_type is None else (value.type, value.sub_type),
            float(np.float32(value.value)) if value.type == GGUFValueType.FLOAT32 else value.value,
        )
        for key, value in {**description.metadata, **description.added_metadata}.items()
    }


def expected_tensors(description: ModelDescription, checkpoint: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """The tensors of an f32 GGUF, made from the checkpoint by the description alone."""
    f32 = gguf.GGMLQuantizationType.F32
    tensors: dict[str, Tensor] = {}
    for rule in description.match({name: values.shape for name, values in checkpoint.items()}):
        values = checkpoint[rule.hf_name]
        if rule.view is not None:
            values = values[resolve(rule.view, values.shape).order()]
        tensors[rule.gguf_name] = (f32, values.shape, values.tobytes())
    for extra in description.extra_tensors:
        tensors[extra.gguf_name] = (f32, extra.values.shape, extra.values.tobytes())
    return tensors


@requires_converter
def test_read_gguf_agrees_with_the_reader_of_the_package_gguf(converted: Path) -> None:
    path = converted / f"{LLAMA}-llama3-v4.gguf"
    keys, tensors = gguf_peer.read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = [field for field in reader.fields.values() if not field.name.startswith("GGUF.")]
    assert keys == {field.name: (tuple(field.types), field.contents()) for field in fields}
    assert tensors == {
        tensor.name: (tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.data.tobytes())
        for tensor in reader.tensors
    }


def check_same_file(folder: Path, converted_file: Path) -> None:
    description = describe(read_config(folder))
    keys, tensors = gguf_peer.read_gguf(converted_file)
    assert keys["general.architecture"][1] == description.gguf_arch
    assert as_stored(description) == arch_metadata(keys, description.gguf_arch)
    written = [*description.metadata, "general.file_type", *description.added_metadata]
    assert written == [key for key in keys if key in written], "order"
    expected = expected_tensors(description, read_checkpoint(folder))
    assert {name: tensor[:2] for name, tensor in expected.items()} == {n: tensor[:2] for n, tensor in tensors.items()}
    assert [name for name in tensors if expected[name] != tensors[name]] == []


@requires_converter
@pytest.mark.parametrize("name", CASES)
def test_same_keys_and_tensors_as_the_reference_converter(converted: Path, name: str) -> None:
    check_same_file(converted / name, converted / f"{name}.gguf")


@requires_converter
@pytest.mark.parametrize("tokenizer", ["hermes4-llama", pytest.param("hermes4-14b", marks=pytest.mark.long)])
def test_same_with_a_real_vocabulary(tmp_path: Path, tokenizer: str) -> None:
    pre, setting = TOKENIZED[tokenizer]
    folder = synthetic.write_checkpoint(
        tmp_path / "model", tied=True, tokenizer=gguf_peer.tokenizer_folder(tokenizer), **setting
    )
    out = tmp_path / "out.gguf"
    if pre:
        gguf_peer.synthetic_pre(folder, "f32", out, pre=pre)
    else:
        gguf_peer.convert(folder, "f32", out)
    check_same_file(folder, out)


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
@pytest.mark.parametrize("rope", synthetic.ROPE)
def test_both_config_styles_describe_the_same_model(architecture: str, rope: str) -> None:
    if rope not in supported_ropes(architecture):
        return
    old, new = (synthetic.make_config(architecture, rope=rope, config_style=style) for style in ("v4", "v5"))
    assert describe(old) == describe(new)


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = ARCHITECTURES[architecture]
    config_class = transformers.CONFIG_MAPPING[family.model_type]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    assert {key: fields[key].default for key in family.defaults} == dict(family.defaults)
    nullable = {key for key in family.defaults if type(None) in typing.get_args(fields[key].type)}
    assert nullable == set(family.nullable & family.defaults.keys())
    assert config_class.default_theta == 10000.0
    assert ("head_dim" in fields) == ("head_dim" in family.defaults)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        *((architecture, {}) for architecture in synthetic.ARCHITECTURES),
        (LLAMA, {"attention_bias": True, "mlp_bias": True}),
        (LLAMA, {"tie_word_embeddings": True}),
        (QWEN3, {"attention_bias": True}),
        (SEED_OSS, {"attention_out_bias": True, "mlp_bias": True}),
        (SEED_OSS, {"attention_bias": False, "head_dim": None}),
    ],
)
def test_tensors_are_those_of_the_transformers_model(architecture: str, overrides: Mapping[str, object]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = synthetic.make_config(architecture, overrides=overrides)
    model_config = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(model_config).state_dict()
    description = describe(config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: rule.shape for name, rule in description.rules.items()
    }
    written = {weight.name: weight.shape for weight in synthetic.weights_of(config)}
    assert [rule.hf_name for rule in description.match(written)] == list(written)


def test_llama3_divisors_reproduce_the_frequencies_of_transformers() -> None:
    """An independent route: base frequency / divisor is the inv_freq that transformers computes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = synthetic.make_config(LLAMA, rope="llama3", overrides={"head_dim": 128})
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(**config), torch.device("cpu"), seq_len=None
    )
    base = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    (extra,) = describe(config).extra_tensors
    assert extra.values.dtype == np.float32
    np.testing.assert_allclose(base / extra.values, scaled.numpy(), rtol=2e-6)
    assert extra.values[0] == 1.0
    assert extra.values[-1] == 8.0


def test_describe_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    script = (
        "import sys, json; from streamquant.convert.architectures import describe; describe(json.loads(sys.argv[1]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    config = json.dumps(synthetic.make_config(LLAMA, rope="llama3"))
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script, config], check=True, cwd=root, timeout=60)


# The four models of the Hermes 4 family, with the sizes in reference/hermes4.md; parameters in billions as published.
HERMES: dict[str, tuple[str, dict[str, int], float, str | Mapping[str, object]]] = {
    "405B": (LLAMA, {"h": 16384, "l": 126, "a": 128, "kv": 8, "d": 128, "f": 53248, "v": 128256}, 405.85, "llama3"),
    "70B": (LLAMA, {"h": 8192, "l": 80, "a": 64, "kv": 8, "d": 128, "f": 28672, "v": 128256}, 70.55, "llama3"),
    "14B": (QWEN3, {"h": 5120, "l": 40, "a": 40, "kv": 8, "d": 128, "f": 17408, "v": 151936}, 14.77, "default"),
    "36B": (SEED_OSS, {"h": 5120, "l": 64, "a": 80, "kv": 8, "d": 128, "f": 27648, "v": 155136}, 36.15, "default"),
}


@pytest.mark.parametrize("model", HERMES)
def test_parameter_counts_of_the_hermes_4_family(model: str) -> None:
    architecture, sizes, billions, rope = HERMES[model]
    keys = {
        "hidden_size": sizes["h"],
        "num_hidden_layers": sizes["l"],
        "num_attention_heads": sizes["a"],
        "num_key_value_heads": sizes["kv"],
        "head_dim": sizes["d"],
        "intermediate_size": sizes["f"],
        "vocab_size": sizes["v"],
    }
    description = describe(synthetic.make_config(architecture, keys, rope=rope))
    count = sum(int(np.prod(rule.shape, dtype=np.int64)) for rule in description.rules.values())
    assert round(count / 1e9, 2) == billions
    assert description.notes == ()


def test_what_a_description_says() -> None:
    description = describe(synthetic.make_config(LLAMA))
    rules = description.rules
    assert (rules["model.embed_tokens.weight"].kind, rules["lm_head.weight"].kind) == (
        TensorKind.EMBEDDING,
        TensorKind.HEAD,
    )
    assert rules["model.layers.1.self_attn.q_proj.weight"].view == rope_view(4, 2)
    assert rules["model.layers.1.self_attn.k_proj.weight"].view == rope_view(2, 2)
    assert rules["model.layers.1.self_attn.v_proj.weight"].view is None
    assert rules["model.norm.weight"].kind is TensorKind.NORM
    assert rules["model.layers.1.post_attention_layernorm.weight"].gguf_name == "blk.1.ffn_norm.weight"
    assert rules["lm_head.weight"].gguf_name == "output.weight"
    assert len({rule.gguf_name for rule in rules.values()}) == len(rules)
    biased = describe(synthetic.make_config(QWEN2)).rules["model.layers.0.self_attn.q_proj.bias"]
    assert (biased.kind, biased.view, biased.shape) == (TensorKind.BIAS, None, (64,))


def test_extra_tensors_compare_by_value() -> None:
    one, same, other = (ExtraTensor("a", np.array(v, np.float32)) for v in ([1, 2], [1, 2], [1, 3]))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "a"


NOTES: list[tuple[str, Setting, str]] = [
    (MISTRAL, {"sliding_window": 4096}, "sliding_window = 4096 is not carried over"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096 is not carried over"),
    (LLAMA, {"max_position_embeddings": ...}, "no max_position_embeddings; transformers' default of 2048"),
    (LLAMA, {"rope_parameters": ...}, "no rope_theta; transformers' default of 10000"),
    (LLAMA, {"rope_theta": 7.0}, "rope_theta = 500000 wins over rope_theta = 7"),
    (LLAMA, {"rope": {"factor": 2.0, "rope_type": "default"}}, "factor has no meaning for rope type 'default'"),
    (LLAMA, {"rope": {**synthetic.ROPE["yarn"], "finetuned": True}}, "finetuned has no meaning"),
    (QWEN2, {"rope": {"rope_type": "yarn", "factor": 2.0}}, "max_position_embeddings = 131072 is used"),
    (LLAMA, {"tie_word_embeddings": True}, "no output.weight unless"),
    (QWEN3, {"attention_bias": True}, "attention_bias = true: llama.cpp does not read"),
    (SEED_OSS, {"attention_out_bias": True}, "attention_out_bias = true: llama.cpp does not read"),
]


def config_with(architecture: str, setting: Setting) -> dict[str, object]:
    overrides = dict(setting)
    return synthetic.make_config(architecture, rope=overrides.pop("rope", "default"), overrides=overrides)


@pytest.mark.parametrize(("architecture", "setting", "note"), NOTES)
def test_notes_tell_what_a_user_should_know(architecture: str, setting: Setting, note: str) -> None:
    assert any(note in line for line in describe(config_with(architecture, setting)).notes)


def test_no_notes_on_windows_that_are_off_or_cover_everything() -> None:
    assert describe(config_with(MISTRAL, {"sliding_window": 131072})).notes == ()
    assert describe(config_with(QWEN2, {"use_sliding_window": False, "sliding_window": 16})).notes == ()


YARN, LLAMA3 = dict(synthetic.ROPE["yarn"]), dict(synthetic.ROPE["llama3"])
# Architecture, overrides, and what the message must contain.
ERRORS: dict[str, tuple[str, Setting, tuple[str, ...]]] = {
    "no architectures": (LLAMA, {"architectures": ...}, ("does not name one", "no such key")),
    "empty architectures": (LLAMA, {"architectures": []}, ("does not name one", "[]")),
    "two architectures": (LLAMA, {"architectures": [LLAMA, QWEN2]}, ("does not name one", LLAMA, QWEN2)),
    "text architectures": (LLAMA, {"architectures": LLAMA}, ("does not name one", "a list of one class name")),
    "number inside": (LLAMA, {"architectures": [7]}, ("does not name one", "[7]")),
    "unknown architecture": (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", LLAMA, SEED_OSS)),
    "other model type": (LLAMA, {"model_type": "mistral"}, ("'model_type'", "mistral", "required: llama")),
    "quantized": (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, ("already quantized", "'fp8'")),
    "quantization is text": (LLAMA, {"quantization_config": "fp8"}, ("'quantization_config'", "a string")),
    "missing key": (LLAMA, {"hidden_size": ...}, ("required key is missing", "'hidden_size'")),
    "null": (LLAMA, {"hidden_size": None}, ("null", "'hidden_size'")),
    "kv heads null in Mistral": (MISTRAL, {"num_key_value_heads": None}, ("null", "'num_key_value_heads'")),
    "head_dim null in Qwen3": (QWEN3, {"head_dim": None}, ("null", "'head_dim'")),
    "text for a number": (LLAMA, {"hidden_size": "64"}, ("a string", "'hidden_size'", "an integer")),
    "boolean for a number": (LLAMA, {"vocab_size": True}, ("a boolean", "'vocab_size'", "an integer")),
    "fraction": (LLAMA, {"num_hidden_layers": 2.0}, ("a number", "'num_hidden_layers'", "an integer")),
    "list": (LLAMA, {"num_key_value_heads": [2, 2]}, ("a list", "'num_key_value_heads'")),
    "negative": (LLAMA, {"hidden_size": -64}, ("out of range", "'hidden_size'", "-64")),
    "no heads": (LLAMA, {"num_attention_heads": 0}, ("out of range", "'num_attention_heads'", "0")),
    "no kv heads": (LLAMA, {"num_key_value_heads": 0}, ("out of range", "'num_key_value_heads'")),
    "odd kv heads": (LLAMA, {"num_key_value_heads": 3}, ("evenly", "3", "a divisor of num_attention_heads = 4")),
    "more kv heads": (LLAMA, {"num_key_value_heads": 8}, ("evenly", "8")),
    "hidden does not divide": (QWEN2, {"hidden_size": 66}, ("'hidden_size'", "66", "a multiple of 4 heads")),
    "hidden does not divide, Llama": (LLAMA, {"hidden_size": 66, "head_dim": 16}, ("'hidden_size'", "66")),
    "odd head_dim": (LLAMA, {"head_dim": 15}, ("halves", "'head_dim'", "15")),
    "implied odd head_dim": (QWEN2, {"hidden_size": 60}, ("halves", "'head_dim'", "15")),
    "vast head_dim": (LLAMA, {"head_dim": 10**9}, ("'head_dim'", "out of range")),
    "vast implied head_dim": (QWEN2, {"hidden_size": 2**30}, ("halves", "'head_dim'", str(2**28))),
    "vast layers": (LLAMA, {"num_hidden_layers": 10**9}, ("'num_hidden_layers'", "1 to 512")),
    "vast vocabulary": (LLAMA, {"vocab_size": 10**12}, ("'vocab_size'", "out of range")),
    "endless integer": (LLAMA, {"vocab_size": 10**5000}, ("'vocab_size'", "an integer of 16610 bits")),
    "NaN": (LLAMA, {"rms_norm_eps": float("nan")}, ("'rms_norm_eps'", "nan", "finite")),
    "infinite": (LLAMA, {"rms_norm_eps": float("inf")}, ("'rms_norm_eps'", "inf", "finite")),
    "beyond float32": (LLAMA, {"rms_norm_eps": 10**400}, ("'rms_norm_eps'", "finite")),
    "below float32": (LLAMA, {"rms_norm_eps": 1e-300}, ("'rms_norm_eps'", "float32", "1e-300")),
    "zero epsilon": (LLAMA, {"rms_norm_eps": 0}, ("'rms_norm_eps'", "more than 0")),
    "epsilon is text": (LLAMA, {"rms_norm_eps": "1e-5"}, ("'rms_norm_eps'", "a string", "a number")),
    "epsilon is true": (LLAMA, {"rms_norm_eps": True}, ("'rms_norm_eps'", "a boolean", "a number")),
    "boolean is text": (LLAMA, {"tie_word_embeddings": "true"}, ("'tie_word_embeddings'", "true or false")),
    "boolean is 1": (LLAMA, {"attention_bias": 1}, ("'attention_bias'", "true or false")),
    "activation": (LLAMA, {"hidden_act": "gelu"}, ("'hidden_act'", "gelu", "silu")),
    "activation is a number": (LLAMA, {"hidden_act": 3}, ("'hidden_act'", "a string")),
    "experts": (LLAMA, {"num_local_experts": 8}, ("mixture of experts", "'num_local_experts'")),
    "other experts": (QWEN2, {"num_experts": 8}, ("mixture of experts", "'num_experts'")),
    "experts true": (LLAMA, {"num_local_experts": False}, ("mixture of experts", "'num_local_experts'")),
    "both directions": (LLAMA, {"is_causal": False}, ("both directions", "'is_causal'")),
    "multimodal": (LLAMA, {"vision_config": {}}, ("multimodal", "'vision_config'")),
    "draft": (LLAMA, {"draft_vocab_size": 32000}, ("draft model", "'draft_vocab_size'")),
    "theta is text": (LLAMA, {"rope": {"rope_theta": "1e4"}}, ("'rope_parameters.rope_theta'", "a string")),
    "zero theta": (LLAMA, {"rope_parameters": ..., "rope_theta": 0.0}, ("'rope_theta'", "more than 1")),
    "rope is text": (LLAMA, {"rope_parameters": "linear"}, ("'rope_parameters'", "an object")),
    "unknown rope": (
        LLAMA,
        {"rope": {"rope_type": "spiral"}},
        ("'spiral' is unknown", "default, linear, llama3, yarn"),
    ),
    "rope type is a number": (LLAMA, {"rope": {"rope_type": 1}}, ("'rope_parameters.rope_type'", "a string")),
    "dynamic": (LLAMA, {"rope": {"rope_type": "dynamic", "factor": 2.0}}, ("'dynamic' is not supported", "length")),
    "longrope": (LLAMA, {"rope": {"rope_type": "longrope"}}, ("'longrope' is not supported", "Phi-3")),
    "su": (
        LLAMA,
        {"rope_parameters": ..., "rope_scaling": {"type": "su"}},
        ("'su' is not supported", "'rope_scaling.type'"),
    ),
    "no type": (
        LLAMA,
        {"rope_parameters": ..., "rope_scaling": {"factor": 2.0}},
        ("without a type", "'rope_scaling.rope_type'"),
    ),
    "two types": (
        LLAMA,
        {"rope_parameters": ..., "rope_scaling": {"type": "yarn", "rope_type": "linear"}},
        ("differ", "'yarn'"),
    ),
    "two spellings": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ("contradict", "'rope_scaling'", "500000"),
    ),
    "unknown rope key": (LLAMA, {"rope": {"sections": [1]}}, ("'sections' is not supported", "unknown")),
    "sections of text": (QWEN2, {"rope": {"mrope_section": "16"}}, ("not the sections of a head", "'16'")),
    "five sections": (QWEN2, {"rope": {"mrope_section": [1] * 5}}, ("not the sections of a head", "up to four")),
    "mscale": (LLAMA, {"rope": {**YARN, "mscale": 1.0}}, ("'mscale' is not supported", "DeepSeek")),
    "layer types": (QWEN3, {"rope_parameters": {"full_attention": {}, "rope_type": "default"}}, ("by layer type",)),
    "partial": (LLAMA, {"partial_rotary_factor": 0.5}, ("partial rotation", "0.5")),
    "partial inside": (LLAMA, {"rope": {"partial_rotary_factor": 0.5}}, ("'rope_parameters.partial_rotary_factor'",)),
    "no factor": (LLAMA, {"rope": {"rope_type": "linear"}}, ("missing", "'rope_parameters.factor'")),
    "factor below 1": (LLAMA, {"rope": {"rope_type": "linear", "factor": 0.5}}, ("below 1", "0.5")),
    "llama3 without context": (
        LLAMA,
        {"rope": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}},
        ("missing", "'rope_parameters.original_max_position_embeddings'"),
    ),
    "llama3 bands": (LLAMA, {"rope": {**LLAMA3, "high_freq_factor": 1.0}}, ("must exceed", "more than 1")),
    "llama3 elsewhere": (QWEN2, {"rope": LLAMA3}, ("does not work for arch 'qwen2'", "default, linear, yarn")),
    "yarn, wrong context outside": (
        QWEN2,
        {"rope": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": "4096"},
        ("an integer is required", "'original_max_position_embeddings'"),
    ),
    "yarn untruncated": (QWEN2, {"rope": {**YARN, "truncate": False}}, ("truncat", "'rope_parameters.truncate'")),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_key_and_value(name: str) -> None:
    architecture, setting, parts = ERRORS[name]
    start = time.perf_counter()
    with pytest.raises(StreamquantError) as caught:
        describe(config_with(architecture, setting))
    assert time.perf_counter() - start < 1.0
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert "config.json" in message
    assert len(message) < 1500


def test_config_that_is_no_object() -> None:
    with pytest.raises(StreamquantError, match="not an object"):
        describe([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.gate_proj.weight": (64, 160)}, "shape does not fit"),
        ({"model.layers.2.mlp.gate_proj.weight": (160, 64)}, "does not explain"),
        ({"model.layers.0.self_attn.q_proj.bias": (64,)}, "does not explain"),
        ({"lm_head.weight": ...}, "lacks tensors"),
        ({"model.norm.weight": ...}, "lacks tensors"),
    ],
)
def test_a_checkpoint_that_does_not_match(change: dict[str, tuple[int, ...] | EllipsisType], message: str) -> None:
    config = synthetic.make_config(LLAMA)
    shapes = {weight.name: weight.shape for weight in synthetic.weights_of(config)}
    changed = {name: shape for name, shape in {**shapes, **change}.items() if not isinstance(shape, EllipsisType)}
    with pytest.raises(StreamquantError, match=message) as caught:
        describe(config).match(changed)
    assert next(iter(change)) in str(caught.value)


def test_known_leftovers_are_ignored_and_a_tied_head_is_optional() -> None:
    config = synthetic.make_config(LLAMA, tied=True)
    shapes = {weight.name: weight.shape for weight in synthetic.weights_of(config)}
    description = describe(config)
    rules = description.match({**shapes, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})
    assert [rule.hf_name for rule in rules] == list(shapes)
    both = description.match({**shapes, "lm_head.weight": (512, 64)})
    assert both[-1].gguf_name == "output.weight"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ALL_KEYS = sorted(
    {key for a in synthetic.ARCHITECTURES for s in ("v4", "v5") for key in synthetic.make_config(a, config_style=s)}
    | {"head_dim", "quantization_config", "num_local_experts", "partial_rotary_factor"}
)
ROPE_KEYS = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "truncate",
]


@settings(max_examples=300, deadline=None)
@given(
    architecture=st.sampled_from(synthetic.ARCHITECTURES),
    rope=st.sampled_from(sorted(synthetic.ROPE)),
    changes=st.dictionaries(st.sampled_from(ALL_KEYS), json_values, max_size=3),
    rope_changes=st.dictionaries(st.sampled_from(ROPE_KEYS), json_values | st.floats(1e-6, 1e38), max_size=2),
)
def test_any_config_is_described_or_refused(
    architecture: str, rope: str, changes: dict[str, object], rope_changes: dict[str, object]
) -> None:
    config = synthetic.make_config(architecture, rope={**synthetic.ROPE[rope], **rope_changes}, overrides=changes)
    try:
        description = describe(config)
    except StreamquantError:
        return
    assert len(description.rules) >= 3 + 9 * description.block_count
    for value in (*description.metadata.values(), *description.added_metadata.values()):
        gguf.GGUFWriter(None, "llama")._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)
