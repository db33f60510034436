"""A small stand-in for a GGUF file: its own tokenizer, template and general keys, byte for byte, around a tiny Llama.

llama.cpp's tokenizer and its Jinja engine read these keys alone, but its server wants a whole model, and reads it whole
(memory maps are populated). With the stand-in the token and chat checks of a 405B cost those of a model of 1M weights.
"""

import os
from pathlib import Path

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from streamquant.files.gguf_file import GgufKeys, pack_header, pack_key, pad, read_raw_metadata
from streamquant.files.writing import replacing
from streamquant.quant.errors import StreamquantError

_HIDDEN = 32
_OWN = ("tokenizer.", "general.")
_SIZES = {
    "block_count": 1,
    "context_length": 512,
    "embedding_length": _HIDDEN,
    "feed_forward_length": _HIDDEN,
    "attention.head_count": 1,
}
_FLOAT_BYTES = 4


def write_vocabulary_gguf(source: Path, target: Path) -> Path:
    """Write the stand-in of the GGUF file `source` and return `target`. The weights are zeros, and take no disk.

    Keys tokenizer.* and general.* are copied as bytes, but for general.architecture, which becomes llama: the tokenizer
    does not depend on it. Raises StreamquantError if `source` is broken or has no vocabulary.
    """
    header, raw = read_raw_metadata(source)
    tokens = GgufKeys(source, header.metadata).texts(Keys.Tokenizer.LIST)
    if not tokens:
        raise StreamquantError(
            "no vocabulary in the file",
            where=str(source),
            required=Keys.Tokenizer.LIST,
            hint="of a split model, give the first file",
        )
    kept = {key: value for key, value in raw.items() if key.startswith(_OWN)}
    head = pack_header(kept | _model_keys(), _tensors(len(tokens)))
    with replacing(target) as file:
        file.write(head)
        file.flush()
        os.ftruncate(file.fileno(), len(head) + sum(pad(nbytes) for _, _, _, nbytes in _tensors(len(tokens))))
    return target


def _model_keys() -> dict[str, bytes]:
    keys = {
        Keys.General.ARCHITECTURE: GGUFValue("llama", GGUFValueType.STRING),
        Keys.General.ALIGNMENT: GGUFValue(pad(1), GGUFValueType.UINT32),
        **{f"llama.{name}": GGUFValue(size, GGUFValueType.UINT32) for name, size in _SIZES.items()},
        "llama.attention.layer_norm_rms_epsilon": GGUFValue(1e-5, GGUFValueType.FLOAT32),
    }
    return {key: pack_key(key, value) for key, value in keys.items()}


def _tensors(vocabulary: int) -> list[tuple[str, tuple[int, ...], str, int]]:
    square, vector = (_HIDDEN, _HIDDEN), (_HIDDEN,)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, _HIDDEN), "output_norm": vector}
    shapes |= {f"blk.0.{name}": vector for name in ("attn_norm", "ffn_norm")}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": square for name in parts}
    return [
        (f"{name}.weight", shape, "F32", shape[0] * (shape[1] if len(shape) > 1 else 1) * _FLOAT_BYTES)
        for name, shape in shapes.items()
    ]
