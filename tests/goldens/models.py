"""The small checkpoints and importance matrices behind the goldens, from integer arithmetic alone.

tests/synthetic.py draws weights by NumPy's generators, whose streams may change with its version. Here each weight is a
function of the tensor's name and its own index, so that the same files come out anywhere and at any time.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xxhash
from numpy.typing import NDArray

from tests import synthetic
from tests.conftest import write_small_tokenizer

LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS = synthetic.ARCHITECTURES
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint: arguments of tests.synthetic.write_checkpoint, and the pre-tokenizer's name of its tokenizer."""

    settings: Mapping[str, Any]
    pre: str = "llama-bpe"

    @property
    def dtype(self) -> str:
        """Of the weights: the converter's --outtype that loses nothing."""
        return str(self.settings.get("dtype", "BF16"))


MODELS: Mapping[str, Model] = {
    # Every rule that counts layers has something to count: 16 // 8 = 2, 16 // 16 = 1. Four query heads share a key.
    "llama": Model({"architecture": LLAMA, "size": dict(zip(_SIZES, (256, 256, 16, 8, 2, 32), strict=True))}),
    # Tied. 288 columns fall back to blocks of 32, 272 to F16; attn_output has 256, and two query heads share a key.
    "qwen3-tied": Model(
        {
            "architecture": QWEN3,
            "tied": True,
            "size": dict(zip(_SIZES, (288, 272, 9, 4, 2, 64), strict=True)),
        },
        "qwen2",
    ),
    # Biases, an F16 source, one query head a key-value head.
    "llama-f16-biases": Model(
        {
            "architecture": LLAMA,
            "dtype": "F16",
            "attention_bias": True,
            "mlp_bias": True,
            "size": dict(zip(_SIZES, (256, 512, 2, 4, 4, 64), strict=True)),
        }
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One way to call llama-quantize on a model, for many file types."""

    model: str
    file_types: tuple[str, ...]
    flags: tuple[str, ...] = ()
    """llama-quantize's, without --imatrix."""
    imatrix: str | None = None
    """"gguf", or "dat" for the legacy format."""


UNQUANTIZED = ("F32", "F16", "BF16")
LEGACY = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
K_MIXES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
OTHERS = ("IQ4_NL", "IQ4_XS", "MXFP4_MOE", "TQ1_0", "TQ2_0")
ALL = (*UNQUANTIZED, *LEGACY, *K_MIXES, *OTHERS)
NEED_IMATRIX = ("Q2_K_S",)
LARGE_ENDS = ("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0")
"""What the community's _L and _XL files are made with."""

RUNS: Mapping[str, Run] = {
    "llama": Run("llama", ALL),
    "qwen3-tied": Run("qwen3-tied", ALL),
    "llama-f16-biases": Run("llama-f16-biases", ALL),
    "llama imatrix": Run("llama", (*ALL[3:], *NEED_IMATRIX), imatrix="gguf"),
    "qwen3-tied imatrix": Run("qwen3-tied", (*ALL[3:], *NEED_IMATRIX), imatrix="dat"),
    "llama large ends": Run("llama", ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L"), LARGE_ENDS),
    "qwen3-tied large ends": Run("qwen3-tied", ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_L"), LARGE_ENDS),
    "llama pure": Run("llama", ("Q4_K_M", "Q5_0"), ("--pure",)),
    "qwen3-tied pure": Run("qwen3-tied", ("Q4_K_M", "Q5_0"), ("--pure",)),
    "llama leave output": Run("llama", ("Q4_K_M", "Q8_0"), ("--leave-output-tensor",)),
    "qwen3-tied leave output": Run("qwen3-tied", ("Q4_K_M",), ("--leave-output-tensor",)),
    "llama tensor types": Run(
        "llama",
        ("Q4_K_M", "Q2_K", "Q8_0", "F16"),
        (
            *("--tensor-type", r"blk\.([0-3]|15)\.attn_V=q8_0", "--tensor-type", "attn_v|ffn_down=Q5_K"),
            *("--tensor-type", "output=q5_1", "--token-embedding-type", "q4_0"),
        ),
    ),
    "qwen3-tied tensor types": Run(
        "qwen3-tied",
        ("Q4_K_M", "Q3_K_L"),
        ("--tensor-type", "attn_(q|k)=q6_k", "--tensor-type", "ffn_down=q2_k", "--output-tensor-type", "q4_1"),
    ),
}
"""What the goldens hold; make.py runs all of it."""


def write_model(name: str, folder: Path) -> Path:
    """The checkpoint `name` of MODELS in a folder of that name below `folder`."""
    settings = dict(MODELS[name].settings)
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    checkpoint = synthetic.write_checkpoint(folder / name, tokenizer=tokenizer, **settings)
    _settle(checkpoint / "model.safetensors")
    return checkpoint


def fingerprint(checkpoint: Path) -> str:
    """XXH3-64 of the weights: what a golden was made from."""
    return xxhash.xxh3_64_hexdigest((checkpoint / "model.safetensors").read_bytes())


def _settle(path: Path) -> None:
    """Put the weights of `values` into a safetensors file, in place of the random ones."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        del header["__metadata__"]
        for name, entry in header.items():
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(synthetic.encode(values(name, tuple(entry["shape"])), entry["dtype"]).tobytes())


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """float32 weights: bell-shaped, spread 0.018 (norms: 1 + 0.07 of it); every 16th row has heavy tails."""
    bell: NDArray[np.float32] = uniform(name, int(np.prod(shape)), 4).sum(axis=1, dtype=np.int64).astype(np.float32)
    bell -= np.float32(2 * 0xFFFF)
    if name.endswith("norm.weight"):
        bell *= np.float32(2.0**-19)
        bell += np.float32(1)
    else:
        heavy = bell.reshape(-1, shape[-1])[5::16]
        heavy *= abs(heavy) * np.float32(2.0**-15)
        bell *= np.float32(2.0**-21)
    return bell.reshape(shape)


def uniform(name: str, count: int, pieces: int) -> NDArray[np.uint16]:
    """uint16[count, pieces <= 4] of 0 to 65535: the words of SplitMix64, with a counter that starts at the name."""
    word = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 24)
    word *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word ^= word >> np.uint64(shift)
        word *= np.uint64(factor)
    word ^= word >> np.uint64(31)
    return word.astype("<u8").view("<u2").reshape(count, 4)[:, :pieces].astype(np.uint16)


CHUNKS, TOKENS = 3, 512


@dataclass(frozen=True, slots=True)
class Entry:
    """What llama-imatrix collects for one tensor: sums of squares by input column, and a number of calls.

    Of stacked experts: sums by expert and column, and the calls of each expert.
    """

    name: str
    calls: tuple[int, ...]
    sums: NDArray[np.float32] = field(repr=False)


def imatrix_entries(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    """An entry for most of the tensors of a GGUF (name -> shape in Hugging Face's order) that are matrices.

    As in real files token_embd has none; one more is missing, of a tensor that Q2_K_S can do without; one was never
    called, and some columns were always zero. Of the experts that GGUF stacks, one was never called.
    """
    for name, shape in sorted(tensors.items()):
        if len(shape) < 2 or name in ("token_embd.weight", "blk.0.ffn_down.weight"):
            continue
        experts = shape[0] if len(shape) == 3 else 1
        pieces = uniform(f"{name} importance", experts * shape[-1], 2).astype(np.float32)
        sums = pieces[:, 0] * pieces[:, 1] * np.float32(2.0**-24)
        sums[pieces[:, 1] < 4096] = 0
        calls = [3 + len(name) + 2 * expert for expert in range(experts)]
        if experts > 1:
            calls[1] = 0
        yield Entry(name, (0,) if name == "blk.2.attn_q.weight" else tuple(calls), sums.reshape(experts, -1))


def write_imatrix(path: Path, entries: list[Entry]) -> Path:
    """llama.cpp's GGUF format, or its legacy one for a path that ends in .dat (tools/imatrix/imatrix.cpp, 11434)."""
    if path.suffix == ".dat":
        path.write_bytes(_legacy(entries))
        return path
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix names no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", CHUNKS)
    writer.add_uint32("imatrix.chunk_size", TOKENS)
    for entry in entries:
        writer.add_tensor(f"{entry.name}.in_sum2", entry.sums)
        writer.add_tensor(f"{entry.name}.counts", np.array(entry.calls, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _legacy(entries: list[Entry]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<i", len(value)) + value.encode()

    parts = [struct.pack("<i", len(entries))]
    for entry in entries:
        (calls,) = entry.calls
        parts += [text(entry.name), struct.pack("<2i", calls, entry.sums.size), entry.sums.tobytes()]
    return b"".join([*parts, struct.pack("<i", CHUNKS), text("calibration.txt")])
