"""The one table of all number formats. A new format is a line here; the shared checks of tests/quant then run on it."""

from streamquant.quant import fp8
from streamquant.quant.format import Format
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
    )
}
"""By name: F32, F16, BF16 and GGML's names as ggml spells them; FP8_CHANNEL_* and FP8_BLOCK_* by source dtype."""
