"""Checkpoints that are quantized already, made of synthetic ones, and their weights by the published formula.

The formula (dequant_model of llama.cpp's conversion/base.py): float32(code) * float32(scale of its block).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import synthetic
from tests.attacks.harness import pack
from tests.conftest import write_small_tokenizer

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZE = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""320 is no multiple of 128: blocks at the edges are smaller."""
Tensors = dict[str, torch.Tensor]
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""As safetensors spells them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How linear layers are quantized: rows and columns of a block (None: all of them), and where scales stand."""

    block: tuple[int | None, int | None] = (128, 128)
    scale_dtype: torch.dtype = torch.float32
    suffix: str = "_scale_inv"

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E4M3 codes and scales of a matrix."""
        rows, columns = (step or size for step, size in zip(self.block, weight.shape, strict=True))
        padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
        blocks = padded.unfold(0, rows, rows).unfold(1, columns, columns)
        scales = (blocks.abs().amax((2, 3)) / 448).clamp(min=1e-12).to(self.scale_dtype)
        return (weight.float() / self.spread(scales, weight.shape)).to(torch.float8_e4m3fn), scales

    def stored(self, name: str, weight: torch.Tensor) -> Tensors:
        """What stands for a matrix."""
        codes, scales = self.encode(weight)
        return {name: codes, name + self.suffix: scales}

    def spread(self, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """float32 scales, one for each weight."""
        rows, columns = (step or size for step, size in zip(self.block, shape, strict=True))
        wide = scales.float().reshape(-1, -(-shape[1] // columns))
        return wide.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


@dataclass(frozen=True, slots=True)
class Packed:
    """INT4 of compressed-tensors, packed by its own code: groups of columns, symmetric or with zero points."""

    group: int = 32
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    suffix: str = "_scale"

    def stored(self, name: str, weight: torch.Tensor) -> Tensors:
        """What stands for a matrix."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        groups = weight.float().reshape(weight.shape[0], -1, self.group)
        least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (groups.abs().amax(2) / 7.5 if self.symmetric else (most - least) / 15).to(self.scale_dtype)
        zero = torch.zeros_like(least) if self.symmetric else (-8 - least / scale.float()).round().clamp(-8, 7)
        codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(-8, 7)
        found = {
            f"{name}_packed": pack_to_int32(codes.reshape(weight.shape).to(torch.int8), 4),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape),
        }
        if not self.symmetric:
            found[f"{name}_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0).contiguous()
        return found

    def decode(self, name: str, stored: Tensors) -> torch.Tensor:
        """float32, by that library's own unpacking."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape, scale = torch.Size(stored[f"{name}_shape"].tolist()), stored[f"{name}_scale"].float()
        codes = unpack_from_int32(stored[f"{name}_packed"], 4, shape).float().reshape(shape[0], -1, self.group)
        if not self.symmetric:
            zero = unpack_from_int32(stored[f"{name}_zero_point"], 4, scale.shape, packed_dim=0).float()
            codes = codes - zero[..., None]
        return (codes * scale[..., None]).reshape(shape)


BLOCK = Scheme()
BLOCK_CONFIG: Mapping[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def is_linear(name: str) -> bool:
    """Whether a tensor is one that publishers quantize."""
    return name.endswith("_proj.weight") or ".w1." in name or ".w2." in name or ".w3." in name


def write_source(folder: Path, **settings: object) -> Path:
    """A synthetic BF16 checkpoint whose rows are wide enough for blocks."""
    tokenizer = write_small_tokenizer(folder.parent / "tokenizer", add_bos_token=True)
    return synthetic.write_checkpoint(folder, **{"tokenizer": tokenizer, "size": SIZE, **settings})  # type: ignore[arg-type]


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def quantize(
    folder: Path,
    scheme: Scheme | Packed = BLOCK,
    config: Mapping[str, object] = BLOCK_CONFIG,
    chosen: Callable[[str], bool] = is_linear,
) -> Path:
    """Quantize the linear layers of a checkpoint of one file in place, and say so in its config.json."""
    tensors = read(folder)
    for name in [name for name in tensors if chosen(name)]:
        tensors.update(scheme.stored(name, tensors.pop(name)))
    write(folder, tensors)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return folder


def write(folder: Path, tensors: Tensors, shard_of: Callable[[str], int] | None = None) -> None:
    """Write the weights again, in the order of their names: one file, or the shards that `shard_of` names.

    (The safetensors library puts larger dtypes first; llama.cpp's converter takes the names of a file in their order.)
    """
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shard_of is None:
        _write_file(folder / SINGLE_FILE, tensors)
        return
    count = 1 + max(shard_of(name) for name in tensors)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(names):
        _write_file(folder / file, {name: value for name, value in tensors.items() if shard_of(name) == number})
    weight_map = {name: names[shard_of(name)] for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_file(path: Path, tensors: Tensors) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in sorted(tensors.items()):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(pack(header, data))


def values(folder: Path, scheme: Scheme | Packed = BLOCK) -> Tensors:
    """The float32 weights of a quantized checkpoint, by the formula."""
    stored = read(folder)
    found = {}
    for name, value in stored.items():
        if isinstance(scheme, Packed):
            if name.endswith("_packed"):
                found[name.removesuffix("_packed")] = scheme.decode(name.removesuffix("_packed"), stored)
            elif not name.endswith(("_scale", "_shape", "_zero_point")):
                found[name] = value.float()
        elif value.dtype == torch.float8_e4m3fn:
            found[name] = value.float() * scheme.spread(stored[name + scheme.suffix], value.shape)
        elif name.removesuffix(scheme.suffix) not in stored or not name.endswith(scheme.suffix):
            found[name] = value.float()
    return found
