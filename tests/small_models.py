"""Small models of every family with their variants, and files that are broken on purpose."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.files.gguf_file import pack_header, pad, read_header
from tests import synthetic
from tests.conftest import TINY_PRE, Shelf, write_small_tokenizer

LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
QWEN3_MOE, MIXTRAL, GLM, QWEN2_MOE, DOTS1, OLMOE = synthetic.MIXTURES
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama3.1": {"architecture": LLAMA, "rope": "llama3"},
    "llama-biased": {"architecture": LLAMA, "attention_bias": True, "mlp_bias": True, "tied": True},
    "llama-linear": {"architecture": LLAMA, "rope": "linear", "config_style": "v4"},
    "mistral": {"architecture": MISTRAL},
    "qwen2": {"architecture": QWEN2, "tied": True},
    "qwen2-yarn": {"architecture": QWEN2, "rope": "yarn"},
    "qwen3": {"architecture": QWEN3, "dtype": "F16"},
    "mixtral": {"architecture": MIXTRAL, "intermediate_size": 256},
    "qwen3-moe": {"architecture": QWEN3_MOE, "moe_intermediate_size": 256},
    "glm": {"architecture": GLM, "moe_intermediate_size": 256, "routed_scaling_factor": 1.5},
    "glm-plain": {
        **{"architecture": GLM, "tied": True, "first_k_dense_replace": 0, "n_routed_experts": 6, "head_dim": ...},
        **{"num_nextn_predict_layers": 0, "attention_bias": False, "use_qk_norm": False, "n_group": 3},
        **{"topk_group": 2, "moe_intermediate_size": 256, "n_shared_experts": 2},
    },
    "qwen2-moe": {"architecture": QWEN2_MOE, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 512},
    "dots1": {"architecture": DOTS1, "moe_intermediate_size": 256, "num_key_value_heads": 8},
    "olmoe": {"architecture": OLMOE, "num_key_value_heads": 8},
    "seed-oss": {"architecture": SEED_OSS, "dtype": "F32"},
}
VARIANTS = "gguf:F32,BF16,Q8_0,Q4_K_M"


class Models:
    """Checkpoints by case, and the --out folders of their conversions."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    def checkpoint(self, case: str, **overrides: object) -> Path:
        """The folder of a case, sharded."""
        settings = {"size": "small", "shards": 2, **CASES[case], **overrides}
        name = f"validate-{case}" + "".join(f"-{key}-{value}" for key, value in sorted(overrides.items()))

        def make(folder: Path) -> None:
            special = synthetic.GLM_TOKENS if settings["architecture"] == GLM else ()
            tokenizer = write_small_tokenizer(folder / "tokenizer", special=special)
            synthetic.write_checkpoint(folder / "Model-1B", tokenizer=tokenizer, **settings)

        return self.shelf.get(name, make) / "Model-1B"

    def variants(self, case: str, specs: str = f"fp8-dynamic {VARIANTS}") -> Path:
        """The output folder of a conversion of a case."""
        source = self.checkpoint(case)

        def make(folder: Path) -> None:
            convert(
                make_plan(open_checkpoint(source), parse_variants(specs.split()), ConversionOptions(pre=TINY_PRE)),
                folder,
                RunOptions(jobs=2),
            )

        return self.shelf.get(f"validate-{case}-{specs}", make)

    def gguf(self, case: str, kind: str) -> Path:
        """One GGUF of a case."""
        return self.variants(case) / "Model-1B-GGUF" / f"Model-1B-{kind}.gguf"

    def fp8(self, case: str) -> Path:
        """The FP8 folder of a case."""
        return self.variants(case) / "Model-1B-FP8-dynamic"


@pytest.fixture(scope="session")
def models(shelf: Shelf) -> Models:
    """Small models of every family; for a conftest.py to import."""
    return Models(shelf)


Edit = Callable[[NDArray[np.uint8]], NDArray[np.uint8] | None]


def edit_gguf(
    source: Path,
    out: Path,
    *,
    keys: Mapping[str, GGUFValue | None] | None = None,
    tensors: Mapping[str, Edit | None] | None = None,
    added: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write a GGUF again with other keys (None removes one) and tensors: a function of the bytes, uint8[rows, bytes]
    or uint8[bytes], None leaves the tensor out; a value that is float32 is stored as F32."""
    header = read_header(source)
    metadata = {key: GGUFValue(value, *header.types[key]) for key, value in header.metadata.items()}
    for key, value in (keys or {}).items():
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    content = source.read_bytes()
    infos, data = [], []
    for tensor in header.tensors:
        raw = np.frombuffer(content[tensor.start : tensor.stop], np.uint8)
        shape, kind = tensor.shape, tensor.stored_as
        if tensors is not None and tensor.name in tensors:
            edit = tensors[tensor.name]
            found = None if edit is None else edit(raw.reshape(shape[0], -1) if len(shape) > 1 else raw.copy())
            if found is None:
                continue
            if found.dtype == np.float32:
                shape, kind = found.shape, "F32"
            raw = np.frombuffer(found.tobytes(), np.uint8)
        infos.append((tensor.name, shape, kind, raw.nbytes))
        data.append(raw.tobytes())
    for name, values in (added or {}).items():
        infos.append((name, values.shape, GGMLQuantizationType.F32.name, values.nbytes))
        data.append(values.tobytes())
    with out.open("wb") as file:
        file.write(pack_header(metadata, infos))
        for raw_bytes in data:
            file.write(raw_bytes + bytes(pad(len(raw_bytes)) - len(raw_bytes)))
    return out
