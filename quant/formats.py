"""The one table of all number formats. A new format is a line here; the shared checks of tests/quant then run on it."""

from streamquant.quant import fp8, integers, microscaling, nvfp4
from streamquant.quant.format import Format, StoredType
from streamquant.quant.ggml import floats, iquants, kquants, legacy, small

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        *floats.FORMATS,
        *legacy.FORMATS,
        *kquants.FORMATS,
        *iquants.FORMATS,
        *small.FORMATS,
        *fp8.FORMATS,
        *integers.FORMATS,
        *microscaling.FORMATS,
        *nvfp4.FORMATS,
    )
}
"""By name: F32, F16, BF16 and GGML's names as ggml spells them; those for compressed-tensors end with a dtype."""

STORED_TYPES: dict[str, StoredType] = {
    entry.name: entry for entry in (*(format_.stored for format_ in FORMATS.values()), *iquants.READ_ONLY)
}
"""By name: the types of weights in files, those that can be read but not made included."""


def stored_type(name: str) -> StoredType:
    """What is known of a type; nothing of one that is not in the table."""
    return STORED_TYPES.get(name) or StoredType(name)


def copy_of(dtype: str) -> Format:
    """The format that keeps weights of a source dtype as they are. Raises KeyError for a dtype without one."""
    return _COPIES[dtype]


_COPIES = {format_.copies: format_ for format_ in FORMATS.values() if format_.copies is not None}
