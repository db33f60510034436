"""GGUF names of tensors: the table of the package gguf, and ours of what gguf 0.19 lacks."""

from collections.abc import Mapping

import gguf

from streamquant.quant.errors import StreamquantError

ADDED: Mapping[str, str] = {
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.head": "nextn.shared_head_head",
    "shared_head.norm": "nextn.shared_head_norm",
}
"""Module of a layer -> its GGUF name in the block, for architectures whose table in gguf 0.19 lacks them (llama.cpp
11434, gguf-py/gguf/constants.py and tensor_mapping.py)."""
SUFFIXES = (".weight", ".bias")


def gguf_name(names: gguf.TensorNameMap, hf_name: str) -> str:
    """The GGUF name of a tensor, looked up as the converter does (ModelBase.map_tensor_name of conversion/base.py).

    Raises StreamquantError if neither table has it.
    """
    # The biases of routers are named otherwise before they are looked up (ModelBase.filter_tensors).
    looked_up = hf_name.replace("e_score_correction_bias", "e_score_correction.bias")
    looked_up = looked_up.replace(".dt_bias", ".dt_proj.bias")  # Qwen3NextModel.modify_tensors of conversion/qwen.py
    if looked_up.endswith("_proj.weight"):  # of Granite's experts, which the converter names itself
        looked_up = looked_up.replace(".block_sparse_moe.experts.", ".mlp.experts.")
    if ".feed_forward.experts." in looked_up:  # LFM2MoeModel.modify_tensors of conversion/lfm2.py
        looked_up = looked_up.removeprefix("model.")
    if looked_up.endswith(".expert_bias"):  # and its filter_tensors
        looked_up += ".bias"
    if looked_up.endswith(".sinks"):  # GptOssModel.filter_tensors
        looked_up += ".weight"
    found = names.get_name(looked_up, try_suffixes=SUFFIXES)
    if found is not None:
        return str(found)
    path, _, suffix = looked_up.rpartition(".")
    parts = path.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in ADDED:
        return f"blk.{parts[2]}.{ADDED[parts[3]]}.{suffix}"
    if path == "lm_head":  # an architecture whose models all tie it
        return f"output.{suffix}"
    raise StreamquantError(
        "the installed package gguf has no name for a tensor",
        where=f"tensor {hf_name!r}",
        found="no entry in its table of names",
        required="gguf 0.19",
        hint="install the version that pyproject.toml asks for",
    )
