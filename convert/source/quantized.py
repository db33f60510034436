"""Sources that are quantized already: which tensors are codes, which are the scales of which, and how they lie.

| quant_method       | codes            | scales                                                                  |
| ------------------ | ---------------- | ----------------------------------------------------------------------- |
| fp8                | F8_E4M3 [N, K]   | `X_scale_inv`, for each block of weight_block_size; without it for all  |
| modelopt           | F8_E4M3 [N, K]   | `X_scale`, one for the tensor, or for each of its rows                  |
| compressed-tensors | F8_E4M3 [N, K]   | `X_scale`, by the strategy of the one group: tensor, channel or block   |
| the same, packed   | `X_packed`       | `X_scale`, and `X_zero_point` where it is not symmetric                 |
| mxfp4              | U8, `X_blocks`   | U8, `X_scales`, of all experts of a layer (fused_experts.py)            |

The value of a weight is float32(code) * float32(scale) (dequant_model of llama.cpp's conversion/base.py). What
quantized activations and a quantized key-value cache need is left out: nothing that is made here has a place for it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamquant.convert.source.config_as_stored import QUANTIZATIONS
from streamquant.convert.source.tensor import Codes, SourceTensor, StoredPart
from streamquant.quant.errors import StreamquantError
from streamquant.quant.source_format import ALL, SourceFormat, fp8, int4
from streamquant.quant.widen import SOURCE_DTYPES

COMPRESSED_TENSORS = ("compressed-tensors", "compressed_tensors")
"""Spellings of quant_method (vllm/config/model.py, _verify_quantization)."""
MXFP4 = "mxfp4"
"""The quant_method of GPT-OSS."""
CODES = "F8_E4M3"
_PACKED = "_packed"
_OF_ACTIVATIONS = (
    *(".input_scale", ".output_scale", ".activation_scale", "_activation_scale"),
    *(".q_scale", ".k_scale", ".v_scale"),
)
_SUFFIXES = {"fp8": "_scale_inv", "modelopt": "_scale", **dict.fromkeys(COMPRESSED_TENSORS, "_scale")}
"""quant_method -> what the names of scales end with."""
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """What weights had lost before they came here."""

    method: str
    """quant_method of config.json."""
    formats: tuple[str, ...]
    """In words, the most frequent first."""
    tensors: int
    """How many are quantized."""

    def __str__(self) -> str:
        """
        >>> str(QuantizedSource("fp8", ("FP8 E4M3, a scale for each block of 128 x 128",), 252))
        'fp8: FP8 E4M3, a scale for each block of 128 x 128'
        """
        return f"{self.method}: {'; '.join(self.formats)}"


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The tensors of a quantized source as tensors of weights, and its config.json without the quantization."""

    tensors: dict[str, SourceTensor]
    config: dict[str, Any]
    quantized: QuantizedSource
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What config.json says of the codes."""

    method: str
    suffix: str
    """Of the scales' names."""
    block: tuple[int, int] | None
    """(rows, columns) that share a scale; None: the shape of the scales tells, one for all or for each row."""
    where: str
    """The scheme's place in config.json."""
    is_packed: bool = False
    """Whether the codes are words of INT4; `block` is then (1, columns of a group)."""

    @property
    def codes_suffix(self) -> str:
        """Of the codes' names."""
        return _PACKED if self.is_packed else ""


def dequantized(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], where: str) -> Dequantized | None:
    """Put codes and scales together; None where no tensor is quantized in a way that is known here.

    `where` is the source as messages name it. Raises StreamquantError for codes without scales, scales without codes
    or of the wrong shape or dtype, and for a scheme that is not known.
    """
    coded = [t.codes.format for t in tensors.values() if t.codes is not None and t.codes.format.is_coded]
    if coded:
        return _put_together(config, tensors, coded)
    scheme = _find_scheme(config, tensors, where)
    if scheme is None:
        return None
    made: dict[str, SourceTensor] = {}
    formats: Counter[str] = Counter()
    taken: set[str] = set()
    for name, codes in tensors.items():
        if scheme.is_packed and name.endswith(_PACKED):
            found = _unpacked(codes, tensors, scheme, where)
            taken.add(f"{found.name}_shape")  # what the packed codes and their groups say too
        elif codes.dtype == CODES and not scheme.is_packed:
            found = _with_scales(codes, tensors.get(name + scheme.suffix), scheme, where)
        else:
            made[name] = codes
            continue
        made[found.name] = found
        taken.update(part.name for part in found.parts if part.name != found.name)
        formats[found.format.about] += 1
    made = {name: tensor for name, tensor in made.items() if name not in taken}
    dropped = [name for name in made if name.endswith(_OF_ACTIVATIONS)]
    for name in dropped:
        del made[name]
    for name in made:
        if name.endswith(scheme.suffix):
            raise StreamquantError(
                "scales without their weights",
                where=f"{where}/{made[name].file}, tensor {name!r}",
                found=_described(tensors.get(name.removesuffix(scheme.suffix))),
                required=f"{name.removesuffix(scheme.suffix) + scheme.codes_suffix!r}, codes of {scheme.method}",
                hint="download the checkpoint again, or tell its publisher",
            )
    source = QuantizedSource(scheme.method, tuple(about for about, _ in formats.most_common()), formats.total())
    return Dequantized(made, _plain(config), source, tuple(_notes(source, dropped)))


def _put_together(
    config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], coded: list[SourceFormat]
) -> Dequantized:
    """A source whose experts came with their scales already."""
    formats = Counter(format_.about for format_ in coded)
    source = QuantizedSource(MXFP4, tuple(about for about, _ in formats.most_common()), formats.total())
    return Dequantized(dict(tensors), _plain(config), source, tuple(_notes(source, [])))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in QUANTIZATIONS}


def _notes(source: QuantizedSource, dropped: list[str]) -> Iterator[str]:
    yield (
        f"made from a quantized source ({source}): {source.tensors} of its tensors had lost precision before, which"
        " no variant gets back"
    )
    if dropped:
        yield f"left out: {len(dropped)} scales of activations or of the key-value cache ({dropped[0]} ...)"


def _described(tensor: SourceTensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _find_scheme(config: Mapping[str, Any], tensors: Mapping[str, SourceTensor], where: str) -> _Scheme | None:
    """The scheme of a source with FP8 codes, or with scales where they should be."""
    key = next((key for key in QUANTIZATIONS if config.get(key) is not None), None)
    settings = config[key] if key is not None else None
    if not isinstance(settings, Mapping):
        return None
    place, method = f"{where}/config.json, {key}", settings.get("quant_method")
    suffix = _SUFFIXES.get(method) if isinstance(method, str) else None
    if suffix is None or not any(t.dtype == CODES or name.endswith(suffix) for name, t in tensors.items()):
        return None
    if method == "fp8":
        return _Scheme(method, suffix, _block(settings.get("weight_block_size"), place), place)
    if method == "modelopt":
        return _Scheme(method, suffix, None, place)
    is_packed = settings.get("format") == "pack-quantized"
    if not is_packed and settings.get("format") not in _FLOAT_FORMATS:
        return None
    block = _block_of_group(settings, place, is_packed=is_packed)
    return _Scheme(COMPRESSED_TENSORS[0], suffix, block, place, is_packed)


def _block(size: object, where: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale, None where there is no size of blocks."""
    if size is None:
        return None
    match size:
        case [int(rows), int(columns)] if rows > 0 and columns > 0 and not isinstance(rows | columns, bool):
            return rows, columns
    raise StreamquantError(
        "a size of blocks that is none",
        where=where,
        found=f"{size!r:.100}",
        required="[rows, columns]",
        hint="download config.json again, or tell the publisher",
    )


def _block_of_group(settings: Mapping[str, Any], where: str, *, is_packed: bool) -> tuple[int, int]:
    """What the one group of a config of compressed-tensors says of its weights."""
    groups = settings.get("config_groups")
    values: Iterable[Any] = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in values if isinstance(group, Mapping)]
    if len(weights) != 1 or not isinstance(weights[0], Mapping):
        raise _unknown(where, f"{len(weights)} groups", "one group with weights")
    kind = {key: weights[0].get(key) for key in ("num_bits", "type", "strategy", "group_size")}
    strategy = kind.pop("strategy")
    wanted = (4, "int") if is_packed else (8, "float")
    if (kind["num_bits"], kind["type"]) != wanted:
        raise _unknown(where, f"weights {kind}", f"num_bits {wanted[0]}, type {wanted[1]}")
    if is_packed:
        size = kind["group_size"]
        if strategy == "group" and type(size) is int and size > 0:
            return 1, size
        if strategy == "channel":
            return 1, ALL
        raise _unknown(where, f"strategy {strategy!r:.100}, group_size {size!r:.100}", "groups of columns, or channel")
    if strategy == "tensor":
        return ALL, ALL
    if strategy == "channel":
        return 1, ALL
    if strategy == "block" and (block := _block(weights[0].get("block_structure"), where)) is not None:
        return block
    raise _unknown(where, f"strategy {strategy!r:.100}", "strategy tensor, channel or block")


def _unknown(where: str, found: str, required: str) -> StreamquantError:
    return StreamquantError(
        "a quantization of the source that is not known",
        where=where,
        found=found,
        required=required,
        hint="start from the original checkpoint in BF16",
    )


def _with_scales(codes: SourceTensor, scale: SourceTensor | None, scheme: _Scheme, where: str) -> SourceTensor:
    """Codes and their scales as one tensor of weights."""
    if scale is None:
        raise StreamquantError(
            "quantized weights without their scales",
            where=f"{where}/{codes.file}, tensor {codes.name!r}",
            found=f"{CODES}, and no {codes.name + scheme.suffix!r}",
            required=f"{codes.name + scheme.suffix!r}, as {scheme.where} has it",
            hint="download the checkpoint again, or start from the original in BF16",
        )
    if len(codes.shape) != 2:
        raise _unknown(f"{where}/{codes.file}, tensor {codes.name!r}", f"{CODES} {list(codes.shape)}", "a matrix")
    if scale.dtype not in SOURCE_DTYPES:
        raise _unknown(
            f"{where}/{scale.file}, tensor {scale.name!r}", f"scales of {scale.dtype}", ", ".join(SOURCE_DTYPES)
        )
    block = scheme.block or _by_shape(scale)
    rows, columns = (-(-size // step) for size, step in zip(codes.shape, block, strict=True))
    is_fine = scale.shape == (rows, columns) or (columns == 1 and scale.shape == (rows,))
    if not is_fine and not (rows == columns == math.prod(scale.shape) == 1):
        raise StreamquantError(
            "scales of the wrong shape",
            where=f"{where}/{scale.file}, tensor {scale.name!r}",
            found=list(scale.shape),
            required=f"[{rows}, {columns}]: {fp8(*block, scale.dtype).about} of {list(codes.shape)}",
            hint=f"compare it with {scheme.where}; download the checkpoint again, or tell its publisher",
        )
    return _coded(codes, (scale,), fp8(*block, scale.dtype))


def _unpacked(codes: SourceTensor, tensors: Mapping[str, SourceTensor], scheme: _Scheme, where: str) -> SourceTensor:
    """Words of INT4 with their scales and zero points as one tensor of weights."""
    assert scheme.block is not None, "a packed scheme has groups"
    base, group = codes.name.removesuffix(_PACKED), scheme.block[1]
    place = f"{where}/{codes.file}, tensor {codes.name!r}"
    if codes.dtype != "I32" or len(codes.shape) != 2:
        raise _unknown(place, f"{codes.dtype} {list(codes.shape)}", "a matrix of I32, 8 codes in each")
    scale, zero = tensors.get(base + scheme.suffix), tensors.get(f"{base}_zero_point")
    if scale is None:
        raise StreamquantError(
            "quantized weights without their scales",
            where=place,
            found=f"no {base + scheme.suffix!r}",
            required=f"{base + scheme.suffix!r}, as {scheme.where} has it",
            hint="download the checkpoint again, or start from the original in BF16",
        )
    if scale.dtype not in SOURCE_DTYPES or (zero is not None and zero.dtype != "I32"):
        found = f"scales of {scale.dtype}" + ("" if zero is None else f", zero points of {zero.dtype}")
        raise _unknown(place, found, f"scales of {', '.join(SOURCE_DTYPES)}, zero points of I32")
    rows, n = codes.shape[0], 8 * codes.shape[1]
    format_ = int4(group, scale.dtype, has_zero_point=zero is not None)
    columns = -(-n // group)
    for part, wanted in ((scale, (rows, columns)), (zero, (-(-rows // 8), columns))):
        if part is not None and part.shape != wanted:
            raise StreamquantError(
                "scales of the wrong shape",
                where=f"{where}/{part.file}, tensor {part.name!r}",
                found=list(part.shape),
                required=f"{list(wanted)}: {format_.about} of {[rows, n]}",
                hint=f"compare it with {scheme.where}; download the checkpoint again, or tell its publisher",
            )
    beside = (scale,) if zero is None else (scale, zero)
    published = None if codes.published is None else codes.published.removesuffix(_PACKED)
    parts = tuple(map(_part, beside))
    own = Codes(format_, parts)
    dtype, shape = format_.floats, (rows, n)
    return SourceTensor(base, dtype, shape, codes.file, codes.start, codes.stop, own, codes.name, published)


def _by_shape(scale: SourceTensor) -> tuple[int, int]:
    """One scale for all, or one for each row, by the shape of the scales."""
    return (ALL, ALL) if math.prod(scale.shape) == 1 else (1, ALL)


def _coded(codes: SourceTensor, beside: tuple[SourceTensor, ...], format_: SourceFormat) -> SourceTensor:
    return replace(codes, dtype=format_.floats, codes=Codes(format_, tuple(map(_part, beside))))


def _part(tensor: SourceTensor) -> StoredPart:
    return StoredPart(tensor.name, tensor.file, tensor.start, tensor.stop)
