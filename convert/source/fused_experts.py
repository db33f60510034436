"""Experts that a checkpoint stores in one tensor, as the tensors of single experts that everything else here knows.

    gate_up_proj  [experts, 2 * intermediate, hidden]  -> experts.N.gate_proj.weight, experts.N.up_proj.weight
    down_proj     [experts, hidden, intermediate]      -> experts.N.down_proj.weight

Each of them is a run of bytes of the stored tensor. (Qwen2MoeModel.modify_tensors of llama.cpp's conversion/qwen.py
cuts in the same places.) GPT-OSS has gate and up by turns, and biases (GptOssModel there):

    gate_up_proj         [experts, hidden, 2 * intermediate]           floats, by columns
    gate_up_proj_bias    [experts, 2 * intermediate]
    gate_up_proj_blocks  [experts, 2 * intermediate, hidden / 32, 16]  or MXFP4, by rows
    gate_up_proj_scales  [experts, 2 * intermediate, hidden / 32]

Stacking, importance, FP8 and validation see single experts, and FP8 folders have the names under which runtimes load
them.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from streamquant.convert.architectures.family import Experts
from streamquant.convert.source.tensor import Codes, SourceTensor, StoredPart
from streamquant.quant.errors import StreamquantError
from streamquant.quant.fused_format import MXFP4_BLOCK, by_columns, by_turns, mxfp4, mxfp4_by_columns
from streamquant.quant.widen import SOURCE_DTYPES

_BLOCKS, _SCALES, _BIAS = "_blocks", "_scales", "_bias"
_BLOCK_BYTES = MXFP4_BLOCK // 2
_FUSED = re.compile(
    rf"(?P<path>(?:.*\.)?experts)\.(?P<name>gate_up_proj|down_proj)(?:\.weight|(?P<kind>{_BLOCKS}|{_SCALES}|{_BIAS}))?"
)
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Fused:
    """A tensor of all experts of a layer, by its name."""

    path: str
    is_down: bool
    kind: str
    """What it holds beside plain weights: _BLOCKS, _SCALES, _BIAS, or nothing."""

    @property
    def parts(self) -> int:
        """Projections in it."""
        return 1 if self.is_down else 2


def _fused(name: str, experts: Experts) -> _Fused | None:
    """None for the name of any other tensor."""
    if experts.fused_names is not None:
        path, _, last = name.removesuffix(_WEIGHT).rpartition(".")
        is_stored = path.endswith(f".{experts.stored_path}") and last in experts.fused_names and name.endswith(_WEIGHT)
        return _Fused(f"{path}.experts", last == experts.fused_names[1], "") if is_stored else None
    match = _FUSED.fullmatch(name)
    kind = "" if match is None else match["kind"] or ""
    if match is None or (kind and not experts.by_turns):
        return None
    return _Fused(match["path"], match["name"] == "down_proj", kind)


def single_experts(name: str, count: int, experts: Experts) -> list[str]:
    """The names of the tensors in a fused one of `count` experts, in the order of their data.

    >>> experts = Experts(("num_experts",), "top_k", "intermediate_size")
    >>> single_experts("model.layers.0.mlp.experts.gate_up_proj", 1, experts)
    ['model.layers.0.mlp.experts.0.gate_proj.weight', 'model.layers.0.mlp.experts.0.up_proj.weight']
    """
    fused = _fused(name, experts)
    assert fused is not None, "the name of no fused tensor"
    parts = [experts.down] if fused.is_down else [experts.gate, experts.up]
    suffix = "bias" if fused.kind == _BIAS else "weight"
    return [f"{fused.path}.{expert}.{part}.{suffix}" for expert in range(count) for part in parts]


def separate_experts(
    tensors: Mapping[str, SourceTensor], experts: Experts | None, where: str
) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint, those that hold all experts of a layer as one tensor for each expert.

    Raises StreamquantError for a fused tensor that does not divide, for blocks of MXFP4 without their scales and scales
    without blocks, and where single experts are there as well.
    """
    if experts is None or not experts.is_fused:
        return dict(tensors)
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        for single in _singles(tensor, tensors, experts, where):
            if single.name in found or (single is not tensor and single.name in tensors):
                raise StreamquantError(
                    "two tensors are the same tensor of the model",
                    where=f"{where}/{tensor.file}, tensor {name!r}",
                    found=f"it holds {single.name!r}, which is there by itself too",
                    hint="keep one of them: a tool has written both",
                )
            found[single.name] = single
    return found


def _singles(
    tensor: SourceTensor, tensors: Mapping[str, SourceTensor], experts: Experts, where: str
) -> Iterator[SourceTensor]:
    """A tensor itself, or the parts that it holds; nothing for scales, which go with their blocks."""
    fused = _fused(tensor.name, experts)
    place = f"{where}/{tensor.file}, tensor {tensor.name!r}"
    if fused is None:
        yield tensor
    elif fused.kind == _SCALES:
        blocks = tensor.name.removesuffix(_SCALES) + _BLOCKS
        if blocks not in tensors:
            raise _lonely("scales without their weights", place, f"{blocks!r}, codes of MXFP4")
    elif fused.kind == _BLOCKS:
        yield from _of_mxfp4(tensor, tensors.get(tensor.name.removesuffix(_BLOCKS) + _SCALES), fused, (experts, place))
    elif experts.by_turns:
        yield from _of_turns(tensor, fused, experts, place)
    else:
        yield from _of_halves(tensor, fused, experts, place)


def _lonely(what: str, place: str, required: str) -> StreamquantError:
    return StreamquantError(
        what,
        where=place,
        found="no such tensor",
        required=required,
        hint="download the checkpoint again, or start from the original in BF16",
    )


def _of_halves(tensor: SourceTensor, fused: _Fused, experts: Experts, place: str) -> Iterator[SourceTensor]:
    """Equal runs of its bytes, one after another."""
    if len(tensor.shape) != 3 or tensor.shape[1] % fused.parts != 0:
        required = "[experts, hidden, intermediate]" if fused.is_down else "[experts, 2 * intermediate, hidden]"
        raise _does_not_divide(tensor, place, required)
    names = single_experts(tensor.name, tensor.shape[0], experts)
    published = single_experts(tensor.published or tensor.name, tensor.shape[0], experts)
    shape = (tensor.shape[1] // fused.parts, tensor.shape[2])
    nbytes = (tensor.stop - tensor.start) // len(names)
    for number, name in enumerate(names):
        start = tensor.start + number * nbytes
        known_as = None if tensor.published is None else published[number]
        yield replace(
            tensor, name=name, shape=shape, start=start, stop=start + nbytes, published=known_as, fused=tensor.name
        )


def _does_not_divide(tensor: SourceTensor, place: str, required: str) -> StreamquantError:
    return StreamquantError(
        "experts that are stored together have a shape that does not divide",
        where=place,
        found=f"{tensor.dtype} {list(tensor.shape)}",
        required=required,
    )


def _of_turns(tensor: SourceTensor, fused: _Fused, experts: Experts, place: str) -> Iterator[SourceTensor]:
    """Floats of GPT-OSS: matrices by columns, and vectors; values of gate and up by turns."""
    rank, step = (2 if fused.kind == _BIAS else 3), fused.parts
    if len(tensor.shape) != rank or tensor.shape[-1] % step != 0 or tensor.dtype not in SOURCE_DTYPES:
        between = "" if fused.kind == _BIAS else ("intermediate, " if fused.is_down else "hidden, ")
        last = "hidden" if fused.is_down else "2 * intermediate"
        raise _does_not_divide(tensor, place, f"floats [experts, {between}{last}]")
    rows, columns = tensor.shape[-1] // step, tensor.shape[1]
    shape = (rows,) if fused.kind == _BIAS else (rows, columns)
    names = single_experts(tensor.name, tensor.shape[0], experts)
    nbytes = (tensor.stop - tensor.start) // tensor.shape[0]
    for number, name in enumerate(names):
        expert, offset = divmod(number, step)
        start, dtype = tensor.start + expert * nbytes, tensor.dtype
        format_ = by_turns(dtype, step, offset) if fused.kind == _BIAS else by_columns(dtype, rows, step, offset)
        yield _part_of(tensor, name, shape, (start, start + nbytes), Codes(format_, ()))


def _of_mxfp4(
    blocks: SourceTensor, scales: SourceTensor | None, fused: _Fused, of: tuple[Experts, str]
) -> Iterator[SourceTensor]:
    """Codes and scales of GPT-OSS, rows of gate and up by turns; `of` are the family's experts, and the place."""
    experts, place = of
    if scales is None:
        name = blocks.name.removesuffix(_BLOCKS) + _SCALES
        raise _lonely("quantized weights without their scales", place, f"{name!r}, a scale for each block")
    step = fused.parts
    fits = len(blocks.shape) == 4 and blocks.shape[3] == _BLOCK_BYTES and blocks.shape[1] % step == 0
    if not fits or blocks.dtype != "U8":
        rows, columns = ("hidden", "intermediate") if fused.is_down else ("2 * intermediate", "hidden")
        raise _does_not_divide(blocks, place, f"U8 [experts, {rows}, {columns} / {MXFP4_BLOCK}, {_BLOCK_BYTES}]")
    if scales.shape != blocks.shape[:3] or scales.dtype != "U8":
        raise StreamquantError(
            "scales of the wrong shape",
            where=f"{place}, with {scales.name!r}",
            found=f"{scales.dtype} {list(scales.shape)}",
            required=f"U8 {list(blocks.shape[:3])}: a scale for each block of {list(blocks.shape)}",
            hint="download the checkpoint again, or tell its publisher",
        )
    count, stored_rows, groups, _ = blocks.shape
    shape, nbytes = (stored_rows // step, groups * MXFP4_BLOCK), math.prod(scales.shape[1:])
    for number, name in enumerate(single_experts(blocks.name, count, experts)):
        expert, offset = divmod(number, step)
        start, first = (of.start + expert * nbytes * size for of, size in ((blocks, _BLOCK_BYTES), (scales, 1)))
        beside = StoredPart(scales.name, scales.file, first, first + nbytes)
        codes = Codes(mxfp4(step, offset), (beside,))
        made = _part_of(blocks, name, shape, (start, start + nbytes * _BLOCK_BYTES), codes)
        yield replace(made, dtype=codes.format.floats)


@dataclass(frozen=True, slots=True)
class WholeExperts:
    """All experts of a layer as transformers' class of GPT-OSS has them in floats, whatever they are stored as."""

    tensor: SourceTensor
    """As rows: those of all experts, one after another."""
    shape: tuple[int, ...]
    """[experts, hidden, 2 * intermediate], or as the class has the tensor."""
    singles: tuple[str, ...]
    """The tensors of single experts in it."""


def whole_experts(tensors: Iterable[SourceTensor]) -> Iterator[WholeExperts]:
    """Those of a checkpoint with gate and up by turns, made of the tensors of single experts; none of any other."""
    groups: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        if tensor.fused is not None and tensor.codes is not None:
            groups.setdefault(tensor.fused, []).append(tensor)
    for fused, singles in groups.items():
        first, codes = singles[0], singles[0].codes
        assert codes is not None, "else it is in no group"
        start, stop = min(single.start for single in singles), max(single.stop for single in singles)
        width = first.shape[0] * codes.format.shared_by
        shape = (len({single.start for single in singles}), *reversed(first.shape[1:]), width)
        made: Codes | None = None
        if codes.format.is_coded:
            scales = [part for single in singles if single.codes is not None for part in single.codes.beside]
            beside = replace(scales[0], start=min(p.start for p in scales), stop=max(p.stop for p in scales))
            made = Codes(mxfp4_by_columns(shape[1], width), (beside,))
        name = fused.removesuffix(_BLOCKS)
        rows = (math.prod(shape[:-1]), width)
        tensor = replace(first, name=name, shape=rows, start=start, stop=stop, codes=made, fused=None)
        yield WholeExperts(tensor, shape, tuple(single.name for single in singles))


def _part_of(
    tensor: SourceTensor, name: str, shape: tuple[int, ...], span: tuple[int, int], codes: Codes
) -> SourceTensor:
    start, stop = span
    return replace(
        tensor,
        name=name,
        shape=shape,
        start=start,
        stop=stop,
        codes=codes,
        stored_name=tensor.stored_name or tensor.name,
        fused=tensor.name,
    )
