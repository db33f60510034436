"""Checkpoints that other tools quantized, as their runtimes compute them: `fp8`, `modelopt` FP8 and GPT-OSS' MXFP4.

The weights are read as a source of `convert` (convert/source/quantized.py). Inputs are quantized as vLLM does it
(model_executor/layers/quantization/fp8.py, modelopt.py):

| quant_method | inputs                                                                                          |
| ------------ | ----------------------------------------------------------------------------------------------- |
| fp8          | activation_scheme dynamic: a scale for each block of columns of a token, as wide as the weights' |
|              | blocks, without blocks one for each token; static: `X.input_scale`                              |
| modelopt     | FP8: `X.input_scale`; FP8_PER_CHANNEL_PER_TOKEN: a scale for each token; FP8_PB_WO: none        |
| mxfp4        | none                                                                                            |
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.model.problem import Problem
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.inputs import described, input_quantizer
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch

_STATIC = ("input_scale", "activation_scale")
"""What the scale of a layer's inputs is called."""
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


class QuantizedVariant(CheckpointVariant):
    """A folder whose quant_method is one of a quantized source's, compressed-tensors left out (compressed.py)."""

    kind = "quantized"

    def __init__(self, stored: Checkpoint, source: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
        """`stored`: the checkpoint as its files have it; `source`: as `as_source` reads it; `settings`: its
        quantization_config, at `where`. Raises StreamquantError for inputs that cannot be quantized as it says."""
        super().__init__(source)
        self._stored = stored
        self._inputs = _inputs(settings, where)
        self._quantizers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        self._where = where
        self._ragged: set[str] = set()
        if self._inputs is not None and self._inputs.dynamic is False:
            for name in self._quantized():
                self._scale(name.removesuffix(".weight"))
        elif self._inputs is not None and (size := self._inputs.group_size):
            self._ragged = {name for name in self._quantized() if self.tensors[name].shape[1] % size}
            if self._ragged:
                self.problems.append(
                    Problem(
                        "activation-groups",
                        "warning",
                        "inputs cannot be quantized in groups: runtimes refuse them; computed with plain inputs",
                        where=f"{self.path}, tensor {min(self._ragged)!r}",
                        found=f"rows of {self.tensors[min(self._ragged)].shape[1]}",
                        required=f"a multiple of {size}",
                    )
                )

    def _quantized(self) -> list[str]:
        tensors = self.checkpoint.tensors
        return [name for name in self.tensors if (codes := tensors[name].codes) is not None and codes.format.is_coded]

    def _scale(self, module: str) -> "torch.Tensor":
        """float32[1]: the static scale of a layer's inputs."""
        found = (self._stored.tensors.get(f"{module}.{name}") for name in _STATIC)
        scale = next((tensor for tensor in found if tensor is not None), None)
        if scale is None or scale.count != 1:
            raise StreamquantError(
                "static activations without their scale",
                where=f"{self._where}, {module!r}",
                found="none" if scale is None else list(scale.shape),
                required=f"{module}.{_STATIC[0]}, one value",
                hint="download the checkpoint again, or tell its publisher",
            )
        return self._whole(scale).float().reshape(1)

    def input_quantizer(self, module: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        """See Variant.input_quantizer: of quantized layers, as the table above has it."""
        name = f"{module}.weight"
        if self._inputs is None or name not in self.tensors or name in self._ragged:
            return None
        codes = self.checkpoint.tensors[name].codes
        if codes is None or not codes.format.is_coded:
            return None
        n = self.tensors[name].shape[1]
        same = module if self._inputs.dynamic is False else str(n)
        if same not in self._quantizers:
            scales = {"input_scale": self._scale(module)} if self._inputs.dynamic is False else {}
            self._quantizers[same] = input_quantizer(self._inputs, scales, n)
        return self._quantizers[same]

    def activations(self) -> str | None:
        """See Variant.activations."""
        return None if self._inputs is None else described(self._inputs)


def _inputs(settings: Mapping[str, Any], where: str) -> Any:
    """QuantizationArgs of the inputs, None where they stay as they are."""
    from compressed_tensors.quantization import QuantizationArgs

    match settings.get("quant_method"), settings.get("activation_scheme"), settings.get("weight_block_size"):
        case "fp8", "dynamic" | None, [int(), int(columns)]:
            return QuantizationArgs(**_FP8, strategy="group", group_size=columns, dynamic=True)
        case "fp8", "dynamic" | None, None:
            return QuantizationArgs(**_FP8, strategy="token", dynamic=True)
        case "fp8", "static", None:
            return QuantizationArgs(**_FP8, strategy="tensor", dynamic=False)
        case "mxfp4", _, _:
            return None
        case "modelopt", _, _:
            return _inputs_of_modelopt(settings.get("quant_algo"), where)
    found = {key: settings.get(key) for key in ("quant_method", "activation_scheme", "weight_block_size")}
    raise _unknown(where, f"{found!r:.200}", "activation_scheme dynamic, or static without weight_block_size")


def _inputs_of_modelopt(algorithm: object, where: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    match algorithm:
        case "FP8":
            return QuantizationArgs(**_FP8, strategy="tensor", dynamic=False)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return QuantizationArgs(**_FP8, strategy="token", dynamic=True)
        case "FP8_PB_WO":
            return None
    raise _unknown(where, f"quant_algo {algorithm!r:.100}", "quant_algo FP8, FP8_PER_CHANNEL_PER_TOKEN or FP8_PB_WO")


def _unknown(where: str, found: str, required: str) -> StreamquantError:
    return StreamquantError(
        "a quantization of the activations that is not known", where=where, found=found, required=required
    )
