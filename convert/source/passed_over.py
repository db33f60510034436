"""An index beside model.safetensors: transformers does not look at it, llama.cpp's converter takes its shards.

Both together are what a folder has into which a model was saved again, in another number of files.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from streamquant.convert.source.weights import INDEX, SINGLE_FILE, Place, read_weight_map
from streamquant.files.safetensors_file import SafetensorsTensor
from streamquant.quant.errors import StreamquantError

SAMPLE = 4096
"""Bytes at the beginning of each tensor that are compared."""
BOTH = f"{SINGLE_FILE} and {INDEX} are both there: {SINGLE_FILE} is converted, as transformers loads it"


@dataclass(frozen=True, slots=True)
class Shards:
    """How the shards of a folder or repository are read. All three raise StreamquantError."""

    has: Callable[[str], bool]
    """Whether there is such a file."""
    headers: Callable[[Sequence[str]], Sequence[Collection[SafetensorsTensor]]]
    """The tensors of each of several files."""
    read: Callable[[str, int, int], bytes]
    """Bytes [start, stop) of a file."""
    most: int | None = None
    """Tensors of which the beginning is read; None: all."""


def passed_over_note(place: Place, shards_of: Shards, single: Collection[SafetensorsTensor]) -> str:
    """What a user should know of an index beside model.safetensors, whose tensors are `single`. Reads a few MB."""
    try:
        weight_map = read_weight_map(place)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not shards_of.has(shard)]:
            return f"{BOTH}; {len(missing)} of {len(shards)} files of the index are not there"
        stored = {
            tensor.name: (shard, tensor)
            for shard, tensors in zip(shards, shards_of.headers(shards), strict=True)
            for tensor in tensors
        }
        difference = _difference(shards_of, {tensor.name: tensor for tensor in single}, stored)
    except StreamquantError as error:
        return f"{BOTH}; the index or a file of it is broken ({error.what})"
    if difference is None:
        return f"{BOTH}; the {len(shards)} files of the index hold the same tensors, as far as their beginnings tell"
    return (
        f"WARNING: {BOTH}, and the {len(shards)} files of the index hold ANOTHER MODEL ({difference}), which"
        " llama.cpp's converter would take: delete those that are not wanted"
    )


def _difference(
    shards: Shards, single: dict[str, SafetensorsTensor], stored: dict[str, tuple[str, SafetensorsTensor]]
) -> str | None:
    """The first difference of two sets of tensors, by names, dtypes, shapes and their first bytes."""
    if odd := sorted(single.keys() ^ stored.keys()):
        return f"only one of them has {odd[0]!r}"
    for name, one in single.items():
        file, other = stored[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{name!r} is {one.dtype} {list(one.shape)}, and {other.dtype} {list(other.shape)} in {file}"
    names = list(single)
    for name in names if shards.most is None else names[:: -(-len(names) // shards.most)]:
        one, (file, other) = single[name], stored[name]
        nbytes = min(SAMPLE, one.stop - one.start)
        ours = shards.read(SINGLE_FILE, one.start, one.start + nbytes)
        if ours != shards.read(file, other.start, other.start + nbytes):
            return f"{name!r} has other weights in {file}"
    return None
