"""Experts that a checkpoint stores in one tensor, as the tensors of single experts that everything else here knows.

    gate_up_proj  [experts, 2 * intermediate, hidden]  -> experts.N.gate_proj.weight, experts.N.up_proj.weight
    down_proj     [experts, hidden, intermediate]      -> experts.N.down_proj.weight

Each of them is a run of bytes of the stored tensor. Stacking, importance, FP8 and validation see single experts, and
FP8 folders have the names under which runtimes load them. (Qwen2MoeModel.modify_tensors of llama.cpp's
conversion/qwen.py cuts in the same places.)
"""

import re

from streamquant.convert.architectures.family import Experts
from streamquant.quant.errors import StreamquantError

_FUSED = re.compile(r"(?P<path>(?:.*\.)?experts)\.(?P<name>gate_up_proj|down_proj)(?:\.weight)?")


def is_fused(name: str) -> bool:
    """Whether a tensor of this name holds all experts of a layer."""
    return _FUSED.fullmatch(name) is not None


def single_experts(name: str, count: int, experts: Experts) -> list[str]:
    """The names of the tensors in a fused one of `count` experts, in the order of their data.

    >>> experts = Experts(("num_experts",), "top_k", "intermediate_size")
    >>> single_experts("model.layers.0.mlp.experts.gate_up_proj", 1, experts)
    ['model.layers.0.mlp.experts.0.gate_proj.weight', 'model.layers.0.mlp.experts.0.up_proj.weight']
    """
    match = _FUSED.fullmatch(name)
    assert match is not None, "see is_fused"
    parts = [experts.down] if match["name"] == "down_proj" else [experts.gate, experts.up]
    return [f"{match['path']}.{expert}.{part}.weight" for expert in range(count) for part in parts]


def shape_of_single(name: str, shape: tuple[int, ...], where: str) -> tuple[int, int]:
    """The shape of the tensors in a fused one. Raises StreamquantError if it does not divide."""
    parts = 1 if ".down_proj" in name else 2
    if len(shape) != 3 or shape[1] % parts != 0:
        raise StreamquantError(
            "experts that are stored together have a shape that does not divide",
            where=where,
            found=list(shape),
            required="[experts, hidden, intermediate]" if parts == 1 else "[experts, 2 * intermediate, hidden]",
        )
    return shape[1] // parts, shape[2]
