"""Which programs run FP8 weights with a scale for each block, and over how many GPUs.

vLLM and SGLang merge q, k and v into one matrix, gate and up into another, and divide both by rows over GPUs, o and
down by columns. A block of 128 x 128 must not lie across two of them: `validate_fp8_block_shape` refuses it
(vllm/model_executor/layers/quantization/utils/fp8_utils.py; SGLang has the same in
python/sglang/srt/layers/quantization/fp8_utils.py). Activations are quantized in groups of 128, which rows of weights
must fill on every GPU (`per_token_group_quant_fp8` of both; transformers: `forward_quantize` of compressed-tensors).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamquant.convert.architectures import ModelDescription, TensorKind
from streamquant.files.json_record import JsonRecord

DEGREES = (1, 2, 4, 8, 16, 32)
"""Degrees of tensor parallelism that are looked at."""
BLOCK = (128, 128)
"""Rows and columns of a block of fp8-block."""
MERGED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
"""Modules of a layer that become one matrix (QKVParallelLinear, MergedColumnParallelLinear)."""
DIVIDED_BY_COLUMNS = ("self_attn.o_proj", "mlp.down_proj")
"""RowParallelLinear."""
SERVERS = ("vLLM", "SGLang")
TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True)
class BlockRuntimes:
    """Which programs run a variant with scales for blocks. The fields are the keys of its record, in their order."""

    names: tuple[str, ...]
    """vLLM, SGLang, transformers, or some of them, or none."""
    tensor_parallel: tuple[int, ...]
    """Those of DEGREES with which vLLM and SGLang load it; empty if they refuse it."""
    refusal: str | None
    """What the least degree of tensor parallelism that vLLM and SGLang refuse is refused for; None: none is."""

    def json(self) -> dict[str, Any]:
        """As in plans and manifests."""
        return {"names": [*self.names], "tensor_parallel": [*self.tensor_parallel], "refusal": self.refusal}

    @property
    def is_refused(self) -> bool:
        """Whether vLLM and SGLang refuse it on one GPU."""
        return not self.tensor_parallel

    def note(self, spec: str) -> str:
        """What a plan says.

        >>> BlockRuntimes(("vLLM", "SGLang", "transformers"), (1, 2), "q has 64 rows").note("fp8-block")
        'fp8-block: vLLM and SGLang run it with tensor parallelism 1, 2; with 4 they refuse it: q has 64 rows'
        """
        if not self.is_refused:
            degrees = ", ".join(str(degree) for degree in self.tensor_parallel)
            said = f"{spec}: vLLM and SGLang run it with tensor parallelism {degrees}"
            beyond = next((degree for degree in DEGREES if degree not in self.tensor_parallel), None)
            return said if self.refusal is None else f"{said}; with {beyond} they refuse it: {self.refusal}"
        runs = "transformers runs it" if self.names else "transformers cannot group the activations either"
        return (
            f"{spec}: vLLM and SGLang refuse this variant: {self.refusal}; {runs}. "
            "fp8-dynamic has no such rule: make that"
        )


def parse_block_runtimes(record: JsonRecord) -> BlockRuntimes:
    """Read the record of a manifest. Raises StreamquantError if it is broken."""
    names, degrees = record.texts("names"), record.take("tensor_parallel")
    if not set(names) <= {*SERVERS, TRANSFORMERS}:
        raise record.broken("names", names, f"some of {', '.join((*SERVERS, TRANSFORMERS))}")
    if not isinstance(degrees, list) or not all(type(degree) is int and degree in DEGREES for degree in degrees):
        raise record.broken("tensor_parallel", degrees, f"a list with some of {', '.join(map(str, DEGREES))}")
    return BlockRuntimes(names, tuple(degrees), record.optional_text("refusal"))


def block_runtimes(
    model: ModelDescription, shapes: Mapping[str, tuple[int, ...]], block: tuple[int, int] = BLOCK
) -> BlockRuntimes:
    """Which programs run `model` where the weights `shapes` (name -> [rows, row length]) have a scale for each block.

    A degree that the model's heads cannot be divided by is none that they refuse for its blocks; it is left out.
    """
    runs: list[int] = []
    refusal = None
    for degree in DEGREES:
        if not _divides(model, degree):
            continue
        refusal = _refusal(model, shapes, block, degree)
        if refusal is not None:
            break
        runs.append(degree)
    groups_fit = all(shape[1] % block[1] == 0 for shape in shapes.values())
    names = (*(SERVERS if runs else ()), *((TRANSFORMERS,) if groups_fit else ()))
    return BlockRuntimes(names, tuple(runs), refusal)


def _heads(model: ModelDescription) -> tuple[int, int]:
    return model.hyperparameters["attention heads"], model.hyperparameters["key-value heads"]


def _divides(model: ModelDescription, degree: int) -> bool:
    """Whether vLLM divides the model at all (model_executor/models/llama.py, LlamaAttention and LlamaMLP)."""
    heads, kv_heads = _heads(model)
    large, small = max(kv_heads, degree), min(kv_heads, degree)
    return heads % degree == 0 and large % small == 0 and model.hyperparameters["feed-forward size"] % degree == 0


def _refusal(
    model: ModelDescription, shapes: Mapping[str, tuple[int, ...]], block: tuple[int, int], degree: int
) -> str | None:
    """The first weight that is refused at a degree, in words; None if none is."""
    share = f" on each of {degree} GPUs" if degree > 1 else ""
    for layer in range(model.layer_count + model.mtp_layer_count):
        for group in MERGED:
            names = [f"model.layers.{layer}.{module}.weight" for module in group]
            # Undivided, only where one member ends and the next begins counts: the last may end within a block.
            for name in names if degree > 1 else names[:-1]:
                if name in shapes and (rows := _rows(model, name, shapes[name][0], degree)) % block[0]:
                    return f"{name} has {rows} rows{share} and is merged with others, required a multiple of {block[0]}"
            for name in names:
                if name in shapes and shapes[name][1] % block[1]:
                    return f"rows of {name} have {shapes[name][1]} weights, required a multiple of {block[1]}"
        for module in DIVIDED_BY_COLUMNS:
            name = f"model.layers.{layer}.{module}.weight"
            if name in shapes and shapes[name][1] // degree % block[1]:
                length = shapes[name][1] // degree
                return f"rows of {name} have {length} weights{share}, required a multiple of {block[1]}"
    if any(name in shapes for name, rule in model.rules.items() if rule.kind is TensorKind.EXPERT):
        # vLLM's compressed_tensors_moe, create_weights: gate and up of an expert are merged, down is divided by columns
        size = model.hyperparameters["expert feed-forward size"] // degree
        if size % block[0]:
            return f"gate and up of an expert have {size} rows each{share}, required a multiple of {block[0]}"
    return None


def _rows(model: ModelDescription, name: str, rows: int, degree: int) -> int:
    """Rows of a merged member on one GPU; heads of keys and values are repeated where there are fewer than GPUs."""
    if ".self_attn.q_proj." in name or ".self_attn." not in name:
        return rows // degree
    kv_heads = _heads(model)[1]
    return rows // kv_heads * max(1, kv_heads // degree)
