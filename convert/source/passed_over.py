"""An index beside model.safetensors: transformers does not look at it, llama.cpp's converter takes its shards.

Both together are what a folder has into which a model was saved again, in another number of files.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from streamquant.convert.source.weights import INDEX, SINGLE_FILE, Place, read_weight_map
from streamquant.files.reading import read_bytes
from streamquant.files.safetensors_file import SafetensorsTensor, read_header
from streamquant.quant.errors import StreamquantError

SAMPLE = 4096
"""Bytes at the beginning of each tensor that are compared."""
BOTH = f"{SINGLE_FILE} and {INDEX} are both there: {SINGLE_FILE} is converted, as transformers loads it"


def passed_over_note(place: Place, folder: Path, single: Collection[SafetensorsTensor]) -> str:
    """What a user should know of an index beside model.safetensors, whose tensors are `single`. Reads a few MB."""
    try:
        weight_map = read_weight_map(place)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            return f"{BOTH}; {len(missing)} of {len(shards)} files of the index are not there"
        stored = {
            tensor.name: (folder / shard, tensor)
            for shard in shards
            for tensor in read_header(folder / shard)[0].values()
        }
        difference = _difference(folder / SINGLE_FILE, {tensor.name: tensor for tensor in single}, stored)
    except StreamquantError as error:
        return f"{BOTH}; the index or a file of it is broken ({error.what})"
    if difference is None:
        return f"{BOTH}; the {len(shards)} files of the index hold the same tensors, as far as their beginnings tell"
    return (
        f"WARNING: {BOTH}, and the {len(shards)} files of the index hold ANOTHER MODEL ({difference}), which"
        " llama.cpp's converter would take: delete those that are not wanted"
    )


def _difference(
    path: Path, single: dict[str, SafetensorsTensor], stored: dict[str, tuple[Path, SafetensorsTensor]]
) -> str | None:
    """The first difference of two sets of tensors, by names, dtypes, shapes and their first bytes."""
    if odd := sorted(single.keys() ^ stored.keys()):
        return f"only one of them has {odd[0]!r}"
    for name, one in single.items():
        file, other = stored[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{name!r} is {one.dtype} {list(one.shape)}, and {other.dtype} {list(other.shape)} in {file.name}"
        stop = min(SAMPLE, one.stop - one.start)
        ours, theirs = read_bytes(path, one.start, one.start + stop), read_bytes(file, other.start, other.start + stop)
        if not np.array_equal(ours, theirs):
            return f"{name!r} has other weights in {file.name}"
    return None
