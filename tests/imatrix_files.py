"""Importance matrices for tests, written by the package gguf and by hand: nothing of streamquant is used."""

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float32]
Entries = Mapping[str, tuple[Sums, NDArray[np.float32]]]
"""Name -> sums float32[matrices, columns], counts float32[matrices, 1]."""


def some_entries(columns: Mapping[str, int], seed: int = 1) -> dict[str, tuple[Sums, NDArray[np.float32]]]:
    """Entries as a run gives them: heavy tails, a column that is always zero."""
    rng = np.random.default_rng(seed)
    entries = {}
    for name, n in columns.items():
        sums = (rng.standard_t(3, (1, n)) ** 2 * 1000).astype(np.float32)
        sums[0, rng.integers(n)] = 0
        entries[name] = sums, np.full((1, 1), 4096, np.float32)
    return entries


def write_imatrix(
    path: Path, entries: Entries, *, datasets: tuple[str, ...] = ("calibration.txt",), chunks: int = 8
) -> Path:
    """As llama-imatrix writes it (tools/imatrix/imatrix.cpp, save_imatrix)."""
    writer = gguf.GGUFWriter(path, "unused")
    writer.kv_data[0].pop("general.architecture")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in sorted(entries.items()):
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
        writer.add_tensor(f"{name}.in_sum", sums / 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_bytes(entries: Mapping[str, tuple[int, Sums]], chunks: int = 8, dataset: str = "calibration.txt") -> bytes:
    """A .dat file: name -> (calls, values)."""
    out = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        raw = name.encode()
        out += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size), values.tobytes()]
    raw = dataset.encode()
    return b"".join([*out, struct.pack("<ii", chunks, len(raw)), raw])


TINY_COLUMNS = {
    f"blk.{layer}.{name}.weight": 512 if name == "ffn_down" else 256
    for layer in range(3)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
}
"""The tensors of the fixture `tiny` that llama-imatrix would see, and the lengths of their rows."""
