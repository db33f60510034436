"""A compressed-tensors checkpoint, decoded by that library's own code, its quantization_config honoured.

What the weights mean, which modules are quantized and what happens to activations is decided by compressed-tensors:
QuantizationConfig reads the config, its matching finds the scheme of a module, the compressor of the format decodes,
and its fake quantization is what `input_quantizer` applies (quantization/lifecycle/forward.py of compressed-tensors,
which is what transformers runs).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamquant.convert.architectures import TensorKind, TensorRule
from streamquant.convert.recipes.block_runtimes import block_runtimes
from streamquant.convert.recipes.targets import Targets
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.tensor import SourceTensor
from streamquant.model.problem import Problem
from streamquant.model.variants.decoding import check_finite, missing_tensor, rows_per_block, wrong_shape
from streamquant.model.variants.folder import QUANTIZATION_KEYS, FolderVariant
from streamquant.model.variants.inputs import described, input_quantizer
from streamquant.model.variants.variant import VariantTensor
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch

ROW_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats whose weight has the shape of the weights: they are decoded by rows. Others are decoded whole."""
FLOATS = ("BF16", "F16", "F32")
METHODS = ("compressed-tensors", "compressed_tensors")
"""Spellings of quant_method (vllm/config/model.py, _verify_quantization)."""
_OF_THE_LIBRARY = (ValueError, TypeError, NotImplementedError, AttributeError, LookupError, RuntimeError)
"""What compressed-tensors raises for a config of wrong types; pydantic's ValidationError is a ValueError."""
_CACHE_SCALE = re.compile(
    r"model\.layers\.(\d{1,6})\.self_attn\.(?:[qkv]_scale|[kv]_proj\.(?:[kv]_scale|output_scale))"
)
"""Scales of a key-value cache, as compressed-tensors writes them, and as it did in 2024 (vllm/model_executor/
model_loader/weight_utils.py, maybe_remap_kv_scale_name)."""


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer or embedding: its scheme, None where it is not quantized, and its stored tensors by local name."""

    scheme: Any
    compressor: Any
    stored: Mapping[str, SourceTensor]


class CompressedVariant(FolderVariant):
    """A folder with quant_method "compressed-tensors" in its quantization_config."""

    kind = "compressed-tensors"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        key = next(key for key in QUANTIZATION_KEYS if checkpoint.config.get(key) is not None)
        self._quantization = self._read_quantization(checkpoint.config[key], key)
        self._schemes = {
            target: scheme for scheme in self._quantization.config_groups.values() for target in scheme.targets
        }
        where = f"{self.path / 'config.json'}, {key}"
        try:
            self._targets = Targets(self._schemes, f"{where}, targets")
            self._ignore = Targets(self._quantization.ignore or (), f"{where}, ignore")
        except re.error as error:
            raise _refused(f"{where}, targets or ignore", error) from error
        self._modules: dict[str, Module] = {}
        self._quantizers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        """Of modules whose inputs are quantized in the same way the same, so that q, k and v can share the result."""
        self.tensors = {}
        self._partial_biases = self.description.partial_biases(checkpoint.tensors)
        for rule in self.description.rules.values():
            self._add(rule)
        stored = {t.name for module in self._modules.values() for t in module.stored.values()}
        self._note_unexplained(stored | set(self.tensors) | self._cache_scales())
        self._note_blocks()
        self._check_activations()

    def _note_blocks(self) -> None:
        """Warn where scales for blocks keep the servers from loading the folder."""
        shapes: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        for name, module in self._modules.items():
            if module.scheme.weights.strategy == "block":
                rows, columns = module.scheme.weights.block_structure
                shapes.setdefault((rows, columns), {})[name] = self.tensors[name].shape
        for block, weights in shapes.items():
            runtimes = block_runtimes(self.description, weights, block)
            if runtimes.is_refused:
                self.problems.append(
                    Problem(
                        "block-shapes",
                        "warning",
                        "vLLM and SGLang refuse weights with scales for blocks of these shapes",
                        found=runtimes.refusal,
                        required=f"blocks of {block[0]} x {block[1]} within each matrix, or a scale for each channel",
                    )
                )

    def _cache_scales(self) -> set[str]:
        """The scales of a quantized key-value cache, where the config has one: runtimes read them, we emulate none."""
        if self._quantization.kv_cache_scheme is None:
            return set()
        found = ((name, _CACHE_SCALE.fullmatch(name)) for name in self.checkpoint.tensors)
        return {name for name, match in found if match is not None and int(match[1]) < self.description.layer_count}

    def _read_quantization(self, settings: object, key: str) -> Any:
        where = f"{self.path / 'config.json'}, {key}"
        method = settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__
        if not isinstance(settings, dict) or method not in METHODS:
            raise StreamquantError(
                "unknown quantization",
                where=where,
                found=f"quant_method {method!r:.100}",
                required="quant_method 'compressed-tensors'",
                hint="beside compressed-tensors, quant_method fp8, modelopt (FP8) and mxfp4 are read",
            )
        for name in ("transform_config", "sparsity_config"):
            value = settings.get(name)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise StreamquantError(f"{name} is not supported", where=where, found=str(value)[:200], required="none")
        if key != QUANTIZATION_KEYS[0]:
            self.problems.append(
                Problem(
                    "config-key",
                    "warning",
                    "transformers does not read this key of config.json and takes the codes for weights; vLLM reads it",
                    where=where,
                    required=QUANTIZATION_KEYS[0],
                )
            )
        from compressed_tensors.quantization import QuantizationConfig

        try:
            config = QuantizationConfig.model_validate(
                {name: value for name, value in settings.items() if name in QuantizationConfig.model_fields}
            )
        except _OF_THE_LIBRARY as error:
            raise _refused(where, error) from error
        if config.kv_cache_scheme is not None:
            self.problems.append(
                Problem("kv-cache", "note", "the quantized key-value cache is not emulated", where=where)
            )
        return config

    def _scheme(self, module: str, kind: TensorKind) -> Any:
        """The scheme of a module, as compressed-tensors' apply_quantization_config finds it; None: not quantized."""
        if self._ignore.first(module, kind) is not None:
            return None
        target = self._targets.first(module, kind)
        return None if target is None else self._schemes[target]

    def _published(self, module: str) -> str:
        """What the files call a module."""
        for local in ("weight", "weight_packed"):
            tensor = self.checkpoint.tensors.get(f"{module}.{local}")
            if tensor is not None and tensor.published is not None:
                return tensor.published.removesuffix(f".{local}")
        return module

    def _add(self, rule: TensorRule) -> None:
        """Match a rule with what the files hold."""
        name = rule.hf_name
        module, _, _ = name.rpartition(".")
        others = (TensorKind.HEAD, TensorKind.EMBEDDING, TensorKind.ROUTER, TensorKind.STATE_INPUT, TensorKind.MTP)
        quantizable = rule.kind.is_linear or rule.kind in others
        scheme = self._scheme(self._published(module), rule.kind) if quantizable else None
        if scheme is not None and scheme.weights is not None and self._add_quantized(rule, module, scheme):
            return
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            if rule.required or name in self._partial_biases:
                raise missing_tensor(rule, self.path, name)
            return
        if tensor.shape != rule.shape:
            raise wrong_shape(rule, self.path / tensor.file, name, tensor.shape)
        if tensor.dtype not in FLOATS:
            self.problems.append(
                Problem(
                    "quantized-tensor",
                    "error",
                    "a quantized tensor that quantization_config leaves out: runtimes take its codes for weights, "
                    "or refuse the file",
                    where=f"{tensor.file}, tensor {name!r}",
                    found=tensor.dtype,
                    required="BF16, or a target in quantization_config",
                )
            )
        self.tensors[name] = VariantTensor(name, tensor.dtype, tensor.shape, tensor.stop - tensor.start)  # type: ignore[index] # filled here, read-only outside

    def _add_quantized(self, rule: TensorRule, module: str, scheme: Any) -> bool:
        """Add a tensor that a scheme covers; False if it is stored as plain floats all the same."""
        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format

        named = scheme.format or self._quantization.format
        if named in (None, "mixed-precision"):
            named = infer_module_format(torch.nn.Linear, scheme)
        format_name = getattr(named, "value", named)
        try:
            compressor = BaseCompressor.get_value_from_registry(format_name)
        except KeyError as error:
            raise _refused(f"{self.path / 'config.json'}, format {format_name!r:.100}", error) from error
        present = self.checkpoint.tensors
        wanted = compressor.compression_param_names(scheme)
        stored = {local: present[f"{module}.{local}"] for local in wanted if f"{module}.{local}" in present}
        weight = stored.get("weight")
        if weight is not None and weight.dtype in FLOATS and len(stored) == 1:
            self.problems.append(
                Problem(
                    "unquantized-tensor",
                    "warning",
                    "a tensor is not quantized although quantization_config says so",
                    where=f"{weight.file}, tensor {rule.hf_name!r}",
                    found=weight.dtype,
                    required=format_name,
                )
            )
            return False
        for local in wanted:
            if local not in stored and "zero_point" not in local:
                if not any(name.startswith(f"{module}.") for name in present) and not rule.required:
                    return False  # a tied head
                raise missing_tensor(rule, self.path, f"{module}.{local}")
        if weight is not None and format_name in ROW_FORMATS and weight.shape != rule.shape:
            raise wrong_shape(rule, self.path / weight.file, rule.hf_name, weight.shape)
        if (scale := stored.get("weight_scale")) is not None and format_name in ROW_FORMATS:
            stored["weight_scale"] = self._shaped_scale(rule, scheme.weights, scale)
        for local in ("input_scale", "input_zero_point", "input_global_scale"):
            if f"{module}.{local}" in present:
                stored[local] = present[f"{module}.{local}"]
        self._modules[rule.hf_name] = Module(scheme, compressor, stored)
        codes = weight or next(iter(stored.values()))
        self.tensors[rule.hf_name] = VariantTensor(  # type: ignore[index] # filled here, read-only outside
            rule.hf_name, codes.dtype, rule.shape, sum(tensor.stop - tensor.start for tensor in stored.values())
        )
        return True

    def _shaped_scale(self, rule: TensorRule, weights: Any, scale: SourceTensor) -> SourceTensor:
        """The scales of a weight [N, K] in the shape that compressed-tensors computes with.

        One value may have any shape, as runtimes take it. A scale for each channel may be [N], which vLLM refuses
        (ChannelQuantScaleParameter is [N, 1]): a warning. Raises StreamquantError for other shapes.
        """
        rows, n = rule.shape
        match weights.strategy:
            case "tensor":
                wanted: tuple[int, ...] = (1,)
            case "channel":
                wanted = (rows, 1)
            case "block":
                height, width = weights.block_structure
                wanted = (-(-rows // height), -(-n // width))
            case "group":
                wanted = (rows, -(-n // weights.group_size))
            case _:
                return scale
        if scale.shape == wanted:
            return scale
        if weights.strategy == "tensor" and math.prod(scale.shape) == 1:
            return replace(scale, shape=wanted)
        if weights.strategy != "channel" or scale.shape != (rows,):
            raise StreamquantError(
                "scales of the wrong shape",
                where=f"{self.path / scale.file}, tensor {scale.name!r}",
                found=list(scale.shape),
                required=f"{list(wanted)}: a scale for each {weights.strategy}",
            )
        problem = Problem(
            "scale-shape", "warning", "vLLM refuses scales of this shape", found="[N]", required="[N, 1] of [N, K]"
        )
        if problem not in self.problems:
            self.problems.append(problem)
        return replace(scale, shape=wanted)

    # Reading

    def blocks(self, name: str) -> "Iterator[tuple[int, torch.Tensor]]":
        """See Variant.blocks."""
        module = self._modules.get(name)
        if module is None:
            yield from self._float_blocks(self.checkpoint.tensors[name])
            return
        rows, n = self.tensors[name].shape
        step = self._row_step(module, n)
        if step is None:
            yield 0, self._decoded(name, module, 0, rows)
            return
        for first in range(0, rows, step):
            yield first, self._decoded(name, module, first, min(first + step, rows))

    def _row_step(self, module: Module, n: int) -> int | None:
        """Rows that can be decoded at a time, None where it must be the whole tensor."""
        weights = module.scheme.weights
        by_rows = "weight" in module.stored and weights.strategy in ("tensor", "channel", "block", "group")
        if not by_rows or not issubclass(module.compressor, _naive()):
            return None
        return rows_per_block(n, weights.block_structure[0] if weights.strategy == "block" else 1)

    def _decoded(self, name: str, module: Module, first: int, last: int) -> "torch.Tensor":
        """float32 rows [first, last): compressed-tensors' decompress with scales widened to float32, which is exact."""
        import torch

        rows = self.tensors[name].shape[0]
        height = module.scheme.weights.block_structure[0] if module.scheme.weights.strategy == "block" else 1
        state = {}
        for local, tensor in module.stored.items():
            if local.startswith("input_"):
                continue
            if (first, last) == (0, rows) or not tensor.shape:
                value = self._whole(tensor)
            elif tensor.shape[0] == rows:
                value = self._stored_rows(tensor, first, last)
            elif tensor.shape[0] == -(-rows // height) and height > 1:
                value = self._stored_rows(tensor, first // height, -(-last // height))
            else:
                value = self._whole(tensor)
            state[local] = value.float() if local.endswith("_scale") and tensor.dtype in FLOATS else value
        try:
            decoded = module.compressor.decompress(state, module.scheme)["weight"]
        except (ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise StreamquantError(
                "compressed-tensors cannot decode a tensor",
                where=f"{self.path}, tensor {name!r}",
                found=f"{type(error).__name__}: {error}",
            ) from error
        block = decoded.to(torch.float32)
        if block.shape != (last - first, self.tensors[name].shape[1]):
            raise StreamquantError(
                "a tensor has another shape when it is decoded",
                where=f"{self.path}, tensor {name!r}",
                found=list(block.shape),
                required=[last - first, self.tensors[name].shape[1]],
            )
        check_finite(block, name, self.path, first)
        return block

    def rows(self, name: str, ids: Sequence[int]) -> "torch.Tensor":
        """See Variant.rows."""
        import torch

        module = self._modules.get(name)
        if module is None:
            tensor = self.checkpoint.tensors[name]
            return torch.cat([self._stored_rows(tensor, number, number + 1).float() for number in ids])
        return torch.cat([block for _, block in self.blocks(name)])[torch.tensor(list(ids))]

    # Activations

    def input_quantizer(self, module: str) -> "Callable[[torch.Tensor], torch.Tensor] | None":
        """compressed-tensors' fake quantization of the input of a module, float[batch, tokens, n] -> the same."""
        found = self._modules.get(f"{module}.weight")
        if found is None or found.scheme.input_activations is None:
            return None
        arguments = found.scheme.input_activations
        size = arguments.group_size
        n = self.tensors[f"{module}.weight"].shape[1]
        if arguments.strategy in ("group", "tensor_group") and size and n % size:
            self._note_ragged(n, size)
            return None
        same = arguments.model_dump_json() if arguments.dynamic is True else module
        if same in self._quantizers:
            return self._quantizers[same]
        scales = {local: self._whole(t) for local, t in found.stored.items() if local.startswith("input_")}
        scales = {
            local: s if (local, s.dtype.itemsize) == ("input_scale", 2) else s.float() for local, s in scales.items()
        }
        self._quantizers[same] = input_quantizer(arguments, scales, n)
        return self._quantizers[same]

    def _check_activations(self) -> None:
        """Raise StreamquantError if the inputs of a module cannot be quantized as the config says."""
        import torch

        tried: set[str] = set()
        for name, module in self._modules.items():
            arguments = module.scheme.input_activations
            if arguments is None:
                continue
            where = f"{self.path / 'config.json'}, input_activations of {name!r}"
            if arguments.dynamic is False and "input_scale" not in module.stored:
                raise StreamquantError(
                    "static activations without their scale",
                    where=where,
                    found=f"no {name.removesuffix('weight')}input_scale",
                    required="a scale for each quantized module, or dynamic: true",
                )
            said = arguments.model_dump_json()
            if said in tried:
                continue
            tried.add(said)
            quantizer = self.input_quantizer(name.removesuffix(".weight"))
            try:
                if quantizer is not None:
                    quantizer(torch.ones(1, 1, self.tensors[name].shape[1]))
            except _OF_THE_LIBRARY as error:
                raise _refused(where, error) from error

    def _note_ragged(self, n: int, size: int) -> None:
        problem = Problem(
            "activation-groups",
            "warning",
            "inputs cannot be quantized in groups: compressed-tensors refuses them; computed with plain inputs",
            found=f"rows of {n}",
            required=f"a multiple of {size}",
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def activations(self) -> str | None:
        """See Variant.activations."""
        schemes = (module.scheme.input_activations for module in self._modules.values())
        lines = {described(arguments) for arguments in schemes if arguments is not None}
        return "; ".join(sorted(lines)) or None


def _refused(where: str, error: Exception) -> StreamquantError:
    """What compressed-tensors said of a config that it cannot work with."""
    found = f"{type(error).__name__}: {error}".replace("\n", "; ")[:300]
    return StreamquantError("compressed-tensors refuses the config", where=where, found=found)


def _naive() -> type:
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor

    return NaiveQuantizationCompressor  # type: ignore[no-any-return]
