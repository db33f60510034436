"""Scales of activations that a calibration measured: tensors of a checkpoint without a source, beside the weights.

As llm-compressor names and computes them (calculate_qparams and generate_gparam of compressed_tensors): MODULE's
input_scale = amax / 448, or input_global_scale, which is a divisor like that of NVFP4 weights; k_scale and v_scale of
each layer's attention, amax / 448. Scales have the dtype of the weights, global scales are float32.
"""

from collections.abc import Iterator, Mapping

from streamquant.convert.plan.layout import Draft, Entry
from streamquant.convert.recipes.calibration import Calibration, is_calibrated
from streamquant.convert.recipes.mix import Choice
from streamquant.convert.recipes.recipe import Recipe, StaticInputs
from streamquant.convert.source.tensor import SourceTensor
from streamquant.files.sizes import shortened
from streamquant.quant import fp8, nvfp4
from streamquant.quant.errors import UsageError
from streamquant.quant.formats import FORMATS, copy_of

_REASON = "measured by the calibration"
_ATTENTION = ".self_attn."


class StaticScales:
    """The scales of a variant that a calibration has."""

    def __init__(self, draft: Draft, recipe: Recipe) -> None:
        """Raises UsageError without a calibration, StreamquantError for that of another model."""
        if draft.options.calibration is None:
            raise UsageError(
                f"{recipe.spec} needs a calibration",
                required="--calibration FILE",
                hint="`streamquant calibrate` makes one of the model and texts",
            )
        self._calibration: Calibration = draft.options.calibration
        self._calibration.check(draft.checkpoint, draft.model)
        self._rules, self._recipe = draft.model.rules, recipe
        self._layers: set[int] = set()

    def with_scales(self, shards: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
        """The shards with the scales, each behind a tensor that it belongs to.

        Raises UsageError for a model with layers that no pass over text goes through.
        """
        entries = [entry for group in shards.values() for entry in group]
        unseen = [e.sources[0].name for e in entries if self._has_input(e) and not self._is_seen(e)]
        if unseen:
            raise UsageError(
                f"{self._recipe.spec} cannot be made of this model",
                where=shortened(unseen, 3),
                found="layers for multi-token prediction, which a pass over text does not go through",
                required="a variant without measured scales of inputs, or these layers left as they are",
                hint=f"--ignore 're:model[.]layers[.]{self._rules[unseen[0]].layer}[.].*'",
            )
        return {path: [made for entry in group for made in self._with(entry)] for path, group in shards.items()}

    def _has_input(self, entry: Entry) -> bool:
        """Whether a tensor is quantized, and a scale of its input is stored."""
        return self._recipe.static_inputs is not None and FORMATS[entry.choice.format].source_dtype is not None

    def _is_seen(self, entry: Entry) -> bool:
        return is_calibrated(self._rules[entry.sources[0].name])

    def _with(self, entry: Entry) -> Iterator[Entry]:
        yield entry
        tensor = entry.sources[0]
        rule = self._rules.get(tensor.name)
        if self._has_input(entry) and rule is not None:
            amax = self._calibration.input_of(rule).amax
            module = entry.name.removesuffix("weight")
            match self._recipe.static_inputs:
                case StaticInputs.FP8:
                    yield _scale(f"{module}{StaticInputs.FP8.value}", tensor, amax)
                case StaticInputs.NVFP4:
                    data = nvfp4.global_scale(amax, tensor.dtype)[0].tobytes()
                    choice = Choice("F32", _REASON)
                    yield Entry(f"{module}{StaticInputs.NVFP4.value}", (), choice, (1,), data=data)
                case None:
                    pass
        if self._recipe.static_cache and rule is not None and rule.layer not in self._layers:
            attention, found, _ = entry.name.partition(_ATTENTION)
            if found and not rule.is_mtp and len(tensor.shape) > 1:
                self._layers.add(rule.layer)
                for kind, amax in zip("kv", self._calibration.cache_of(rule.layer), strict=True):
                    yield _scale(f"{attention}{_ATTENTION}{kind}_scale", tensor, amax)


def _scale(name: str, tensor: SourceTensor, amax: float) -> Entry:
    choice = Choice(copy_of(tensor.dtype).name, _REASON)
    return Entry(name, (), choice, (1,), data=fp8.static_scale(amax, tensor.dtype))
