"""The layer-streamed forward pass: many models in lock step, one decoder layer in memory at a time.

The layers are transformers' own modules, built on the meta device and filled for as long as they are needed: read
layer i of each model, push all rows of tokens through it, keep the hidden states, drop the weights. Each weight is read
once however many tokens there are, and memory is that of two layers and the hidden states, whatever the depth: while
one layer computes, a thread reads the next.
"""

import ctypes
import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.architectures import TensorKind, TensorRule
from streamquant.files.listener import SILENT, Listener
from streamquant.model.errors import errors_of
from streamquant.model.expert_streaming import ExpertCalls
from streamquant.model.experts import module_name, separate_experts
from streamquant.model.variants.variant import EMBEDDINGS, Variant
from streamquant.quant.errors import StreamquantError, UsageError

if TYPE_CHECKING:
    import torch

DType = Literal["bf16", "f32"]
Attention = Literal["sdpa", "eager"]
Tokens = NDArray[np.int64]
"""int64[chunks, context]: token ids, each row a text of its own from position 0."""

TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
WITHOUT_CACHE = ("linear_attention", "conv")
"""Kinds of layers that have neither a mask nor a key-value cache."""
BATCH_TOKENS = 2048
"""Tokens that go through a layer at a time, as many as llama.cpp's n_batch; whole chunks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How to compute. The defaults fit the machine: see `default_setting`."""

    device: str = "cpu"
    dtype: DType = "f32"
    """Of weights and hidden states. Logits and statistics are float32 and float64 in either case."""
    weights_only: bool = False
    """Leave activations as they are where the runtime would quantize them."""
    batch_tokens: int = BATCH_TOKENS
    memory_limit: int | None = None
    """Bytes of hidden states that are kept in memory; more go to a file. None: a quarter of what is free."""
    layer_limit: int | None = None
    """Bytes of the weights of a layer in memory; of a larger one the experts are read one at a time. None: a sixth of
    what is free, as two layers are held, and their files are mapped."""
    scratch: Path | None = None
    """Folder of that file, None for the system's. It is removed at the end, and by the system after a crash."""
    attention: Attention = "sdpa"
    """transformers' implementation; a class that does not have sdpa takes eager in either case. In BF16 the two differ
    in the last digits: what must have the numbers of llm-compressor takes its eager."""


def default_setting(device: str = "auto") -> Setting:
    """cuda and bf16 where there is a GPU, else cpu and f32: on CPUs without AMX, BF16 is several times slower."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no such device", found=device, required="cpu: torch sees no CUDA GPU here")
    return Setting(device=device, dtype="bf16" if device.startswith("cuda") else "f32")


InputObserver = Callable[[str, "torch.Tensor"], None]
"""Gets the HF name of a linear layer ("model.layers.0.mlp.up_proj") and its input, [chunks, tokens, n]; of an expert
[tokens, n], those that it was chosen for."""
CacheObserver = Callable[[int, "torch.Tensor", "torch.Tensor"], None]
"""Gets a layer and what it would put into a key-value cache, keys after rope and values: [chunks, heads, tokens, n]."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a lane goes on that was interrupted."""

    layer: int
    """The first layer to run."""
    fill: "Callable[[torch.Tensor], None]"
    """Puts the hidden states before that layer into [chunks, context, hidden_size]."""


@dataclass(eq=False)
class Lane:
    """One model of the lock step, and how it is computed where that differs from the setting."""

    variant: Variant
    dtype: DType | None = None
    batch_tokens: int | None = None
    weights_only: bool | None = None
    on_input: InputObserver | None = None
    on_weight: "Callable[[str, int, torch.Tensor], None] | None" = None
    """Gets name, first row and float32 rows of every tensor while it is decoded, in the reading thread."""
    on_layer: "Callable[[int, torch.Tensor], None] | None" = None
    """Gets a layer and the hidden states after it, [chunks, context, hidden_size]; -1 is the embeddings."""
    on_cache: CacheObserver | None = None
    lengths: "NDArray[np.int64] | None" = None
    """int64[chunks]: tokens of each chunk that are run, None: all. Chunks of one length, one after another, make a
    batch; what stands behind the tokens of a chunk is not computed."""
    beginning: Beginning | None = None
    """None: at the embeddings."""
    hidden: "torch.Tensor | None" = field(default=None, init=False)
    """[chunks, context, hidden_size] after the last layer that ran; before the final norm."""
    bytes_read: int = field(default=0, init=False)

    def torch_dtype(self, setting: Setting) -> "torch.dtype":
        """The dtype that this lane computes in."""
        import torch

        return getattr(torch, TORCH_DTYPES[self.dtype or setting.dtype])

    def batch(self, setting: Setting, context: int) -> int:
        """Chunks that go through a layer at a time."""
        return max(1, (self.batch_tokens or setting.batch_tokens) // context)

    def quantizes_inputs(self, setting: Setting) -> bool:
        """Whether quantized activations are emulated."""
        weights_only = setting.weights_only if self.weights_only is None else self.weights_only
        return not weights_only


def run_layers(lanes: Sequence[Lane], tokens: Tokens, setting: Setting, listener: Listener = SILENT) -> None:
    """Run all decoder layers of all lanes over `tokens`, in lock step; leaves `Lane.hidden` for the head.

    The listener hears of every layer of every lane as a step of "layers"; `count_layers` says how many there are.
    Raises VariantError if a token is not in a vocabulary or a variant cannot be read. The hidden states live until the
    lanes are dropped.
    """
    import torch

    check_tokens(lanes, tokens)
    models = [_Model(lane, tokens.shape, setting) for lane in lanes]
    with torch.inference_mode():
        for model in models:
            model.begin(tokens)
        steps = [
            (layer, number)
            for layer in range(max((model.layers for model in models), default=0))
            for number, model in enumerate(models)
            if model.first_layer <= layer < model.layers
        ]
        last_of_layer = dict(steps)
        for (layer, number), weights in _ahead(steps, lambda step: models[step[1]].read(step[0])):
            models[number].step(layer, weights)
            del weights
            # Once a layer: the next model takes what one leaves. Mapping the same pages again was a tenth of the time.
            if number == last_of_layer[layer]:
                release_memory()
            models[number].observe(layer)
            listener.advanced("layers")


def count_layers(lanes: Sequence[Lane]) -> int:
    """Decoder layers of all lanes together: the steps of `run_layers`."""
    return sum(lane.variant.description.layer_count for lane in lanes)


def release_memory() -> None:
    """Give free memory back to the system: malloc of glibc keeps it, scattered, and several MB more with each layer."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def check_tokens(lanes: Sequence[Lane], tokens: Tokens) -> None:
    """Raise StreamquantError if there are no tokens, VariantError if one has no row in the embeddings of a lane."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise StreamquantError("no tokens to run", found=f"shape {list(tokens.shape)}", required="[chunks, context]")
    for lane in lanes:
        with errors_of(lane.variant):
            _check_tokens(lane.variant, tokens)


def _check_tokens(variant: Variant, tokens: Tokens) -> None:
    size, least, most = variant.description.vocab_size, int(tokens.min()), int(tokens.max())
    if most >= size or least < 0:
        raise StreamquantError(
            "a token is not in the vocabulary",
            where=str(variant.path),
            found=most if most >= size else least,
            required=f"0 to {size - 1}",
            hint="the tokenizer is not that of this model",
        )


Step = TypeVar("Step")


def _ahead(
    steps: Sequence[Step], read: "Callable[[Step], dict[str, torch.Tensor]]"
) -> "Iterator[tuple[Step, dict[str, torch.Tensor]]]":
    """Each step with what `read` gives for it, which a thread reads while the caller works on the step before."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        coming: Future[dict[str, torch.Tensor]] | None = None
        for at, step in enumerate(steps):
            weights = coming.result() if coming is not None else read(step)
            coming = reader.submit(read, steps[at + 1]) if at + 1 < len(steps) else None
            yield step, weights
            del weights


class _Model:
    """A lane with its skeleton on the meta device, rotary tables, masks and hidden states."""

    def __init__(self, lane: Lane, shape: tuple[int, ...], setting: Setting) -> None:
        import torch

        self.lane, self.setting = lane, setting
        self.dtype, self.device = lane.torch_dtype(setting), torch.device(setting.device)
        self.batch = lane.batch(setting, shape[1])
        self.skeleton = build_skeleton(lane.variant, setting.attention)
        self.layers = lane.variant.description.layer_count
        self.first_layer = 0 if lane.beginning is None else lane.beginning.layer
        self.layer_limit = free_memory(setting.device) // 6 if setting.layer_limit is None else setting.layer_limit
        size = (shape[0], shape[1], lane.variant.config["hidden_size"])
        lane.hidden = allocate_hidden(size, self.dtype, setting)
        positions = torch.arange(shape[1], device=self.device)[None]
        self.rotary = rotary_tables(self.skeleton, lane.variant, positions, self.dtype)
        self.positions = positions

    def begin(self, tokens: Tokens) -> None:
        """The hidden states before the first layer that is run."""
        if self.lane.beginning is None:
            self.embed(tokens)
        else:
            assert self.lane.hidden is not None
            self.lane.beginning.fill(self.lane.hidden)

    def embed(self, tokens: Tokens) -> None:
        """The hidden states before the first layer; only the rows that occur are read."""
        import torch

        assert self.lane.hidden is not None
        for first in range(0, len(tokens), self.batch):
            ids, inverse = np.unique(tokens[first : first + self.batch], return_inverse=True)
            with errors_of(self.lane.variant):
                rows = self.lane.variant.rows(EMBEDDINGS, ids.tolist()).to(self.dtype)
            scale = getattr(self.skeleton.model.embed_tokens, "scalar_embed_scale", None)  # of Gemma
            scale = getattr(self.skeleton.model, "embedding_multiplier", scale)
            rows = rows if scale is None else rows * torch.tensor(scale).to(self.dtype)
            picked = rows[torch.from_numpy(inverse.reshape(-1))]
            self.lane.hidden[first : first + self.batch] = picked.reshape(-1, tokens.shape[1], rows.shape[1])
        self.observe(-1)

    def observe(self, layer: int) -> None:
        """Show the hidden states after a layer to the lane's observer."""
        if self.lane.on_layer is not None and self.lane.hidden is not None:
            self.lane.on_layer(layer, self.lane.hidden)

    def read(self, layer: int) -> "dict[str, torch.Tensor]":
        """The weights of a layer by their names in it, on the device; not the experts of one that is too large."""
        rules = self.lane.variant.layer_rules(layer)
        if self.has_experts_apart(layer):
            rules = [rule for rule in rules if rule.expert is None]
        return self._read(rules, layer, observed=True)

    def has_experts_apart(self, layer: int) -> bool:
        """Whether the experts of a layer are read one at a time."""
        rules = self.lane.variant.layer_rules(layer)
        nbytes = sum(prod(rule.shape) for rule in rules) * self.dtype.itemsize
        return nbytes > self.layer_limit and any(rule.expert is not None for rule in rules)

    def _read(self, rules: Iterable[TensorRule], layer: int, *, observed: bool) -> "dict[str, torch.Tensor]":
        import torch

        variant, prefix = self.lane.variant, f"model.layers.{layer}."
        weights = {}
        for rule in rules:
            name = rule.hf_name
            # transformers keeps these in float32 whatever the model computes in (_keep_in_fp32_modules_strict)
            dtype = torch.float32 if rule.kind is TensorKind.ROUTER_BIAS else self.dtype
            with errors_of(variant):
                whole = variant.read(name, dtype, self._observer(name) if observed else None)
            weights[module_name(name.removeprefix(prefix), variant.description.family.experts)] = whole.to(self.device)
            self.lane.bytes_read += variant.tensors[name].nbytes if name in variant.tensors else 0
        return weights

    def _observer(self, name: str) -> "Callable[[int, torch.Tensor], None] | None":
        observe = self.lane.on_weight
        if observe is None or name not in self.lane.variant.tensors:
            return None
        return lambda first, block: observe(name, first, block)

    def step(self, layer: int, weights: "dict[str, torch.Tensor]") -> None:
        """Push all rows through a layer, and empty it again."""
        module = self.skeleton.model.layers[layer]
        hidden = self.lane.hidden
        assert hidden is not None
        if self.has_experts_apart(layer):
            self._step_expert_by_expert(layer, module, weights)
        else:
            self._fill(layer, module, weights)
            with ExitStack() as hooks:
                self._hook(hooks, module.named_modules(), layer)
                for rows, output in self._outputs(layer, module, range(len(hidden))):
                    rows.copy_(output)
        module.to("meta")

    def _fill(self, layer: int, module: Any, weights: "dict[str, torch.Tensor]") -> None:
        """Put the weights of a layer into its module; nothing may be missing."""
        module.load_state_dict(weights, strict=False, assign=True)
        held = chain(module.named_parameters(), module.named_buffers())
        left = [name for name, tensor in held if tensor.device.type == "meta"]
        with errors_of(self.lane.variant):
            if left:
                raise StreamquantError(
                    "transformers' layer has a tensor that the variant does not have",
                    where=str(self.lane.variant.path),
                    found=f"no {left[0]!r} in layer {layer}",
                )

    def _rotary_of(self, layer: int) -> "tuple[torch.Tensor, torch.Tensor] | None":
        types = getattr(self.skeleton.config, "layer_types", None)
        return self.rotary[types[layer] if types is not None and None not in self.rotary else None]

    def _batches(self, chunks: range) -> Iterator[tuple[int, int, int]]:
        """(first chunk, last, tokens of each) of the batches of some chunks."""
        if self.lane.lengths is None:
            for first in chunks[:: self.batch]:
                yield first, min(first + self.batch, chunks.stop), self.positions.shape[1]
            return
        first = chunks.start
        while first < chunks.stop:
            length, last = int(self.lane.lengths[first]), first + 1
            while last < min(first + self.batch, chunks.stop) and self.lane.lengths[last] == length:
                last += 1
            yield first, last, length
            first = last

    def _outputs(
        self, layer: int, module: Any, chunks: range, *, observed: bool = True
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """(rows of hidden states, what the layer makes of them), batch by batch."""
        config, hidden, watch = self.skeleton.config, self.lane.hidden, self.lane.on_cache
        assert hidden is not None
        kinds = getattr(config, "layer_types", None)
        is_linear = kinds is not None and kinds[layer] in WITHOUT_CACHE
        whole = None if is_linear else causal_mask(config, layer, self.positions)
        if config._attn_implementation == "eager" and not is_linear:
            whole = added_mask(whole, self.positions, self.dtype)
        rotary = self._rotary_of(layer)
        cache = {}
        if observed and not is_linear and watch is not None:
            cache[_cache_parameter(module)] = _WatchedCache(layer, watch)
        for first, last, length in self._batches(chunks):
            rows = hidden[first:last, :length]
            output = module(
                rows.to(self.device),
                attention_mask=None if whole is None else whole[..., :length, :length],
                position_ids=self.positions[:, :length],
                use_cache=False,
                position_embeddings=cut_tables(rotary, length),
                **cache,
            )
            yield rows, output[0] if isinstance(output, tuple) else output

    def _step_expert_by_expert(self, layer: int, module: Any, weights: "dict[str, torch.Tensor]") -> None:
        """See model/expert_streaming.py. A share of the tokens is what fits beside the weights of one expert."""
        experts, hidden = self.lane.variant.description.family.experts, self.lane.hidden
        assert experts is not None
        assert hidden is not None
        block = module.get_submodule(experts.path)
        whole = block.experts
        stored: dict[int, list[TensorRule]] = {}
        for rule in self.lane.variant.layer_rules(layer):
            if rule.expert is not None:
                stored.setdefault(rule.expert.number, []).append(rule)
        chunk_bytes = 2 * prod(hidden.shape[1:]) * self.dtype.itemsize  # what the experts are asked, and their answer
        share = max(1, self.layer_limit // chunk_bytes // self.batch) * self.batch
        for first in range(0, len(hidden), share):
            part, asked = range(first, min(first + share, len(hidden))), ExpertCalls()
            with ExitStack() as hooks, asked.noted(block):
                self._fill(layer, module, weights)
                self._hook(hooks, module.named_modules(), layer, observed=False)
                for _ in self._outputs(layer, module, part, observed=False):
                    pass
            # Observers of weights see every expert once; others are read where tokens go.
            numbers = sorted(stored) if first == 0 and self.lane.on_weight is not None else asked.reached()
            read = partial(self._read_expert, layer, stored, observed=first == 0)
            for number, of_expert in _ahead(numbers, read):
                name = f"{experts.path}.experts.{number}"
                whole[number].load_state_dict(
                    {key.removeprefix(f"{name}."): value for key, value in of_expert.items()}, assign=True
                )
                with ExitStack() as hooks:
                    self._hook(hooks, whole[number].named_modules(prefix=name), layer)
                    for call in asked.calls:
                        whole.answer(call, number)
                whole[number].to("meta")
            with ExitStack() as hooks, asked.answered(block):
                self._hook(hooks, module.named_modules(), layer)
                for rows, output in self._outputs(layer, module, part):
                    rows.copy_(output)

    def _read_expert(
        self, layer: int, stored: Mapping[int, list[TensorRule]], number: int, *, observed: bool
    ) -> "dict[str, torch.Tensor]":
        return self._read(stored[number], layer, observed=observed)

    def _hook(
        self, hooks: ExitStack, modules: "Iterable[tuple[str, Any]]", layer: int, *, observed: bool = True
    ) -> None:
        """Watch and quantize the inputs of the linear layers among the modules of a layer while `hooks` is open."""
        import torch

        prefix = f"model.layers.{layer}."
        experts = self.lane.variant.description.family.experts
        rules = {
            module_name(rule.hf_name.removeprefix(prefix), experts): rule
            for rule in self.lane.variant.layer_rules(layer)
        }
        last: list[Any] = [None, None, None]  # q, k and v have one input, and gate and up: it is quantized once
        for name, linear in modules:
            rule = rules.get(f"{name}.weight")
            is_router = rule is not None and rule.kind is TensorKind.ROUTER  # transformers has a class of its own
            if rule is None or not (is_router or isinstance(linear, torch.nn.Linear)):
                continue
            stored = rule.hf_name.removesuffix(".weight")
            observe = self.lane.on_input if observed else None
            quantize = self.lane.variant.input_quantizer(stored) if self.lane.quantizes_inputs(self.setting) else None

            def before(
                _module: Any, arguments: Any, name: str = stored, observe: Any = observe, quantize: Any = quantize
            ) -> Any:
                x, *others = arguments  # a router may be given the bias of its choice too
                if observe is not None:
                    observe(name, x)
                if quantize is None:
                    return None
                if last[0] is not x or last[1] is not quantize:
                    last[:] = [x, quantize, quantize(x)]
                return (last[2], *others)

            if observe is not None or quantize is not None:
                hooks.callback(linear.register_forward_pre_hook(before).remove)


def _cache_parameter(module: Any) -> str:
    """What a decoder layer's forward calls the key-value cache: transformers renamed it in 5.24, class by class."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


class _WatchedCache:
    """Stands for the key-value cache of a layer: what would be put into it is shown, and given back as it is.

    As QuantizedKVCache of compressed_tensors/modeling/kvcache.py, by which llm-compressor observes keys and values.
    """

    def __init__(self, layer: int, watch: CacheObserver) -> None:
        self._layer, self._watch = layer, watch

    def update(
        self, keys: "torch.Tensor", values: "torch.Tensor", *_: Any, **__: Any
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """As transformers' Cache.update, without anything from before."""
        self._watch(self._layer, keys, values)
        return keys, values


def build_skeleton(variant: Variant, attention: Attention = "sdpa") -> Any:
    """transformers' model of the variant's class on the meta device: no weights, no memory.

    A class that does not have sdpa, because of its attention sinks, is given eager attention.
    """
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    settings = {key: value for key, value in variant.config.items() if key not in ("dtype", "torch_dtype")}
    # Some classes have a padding token of their own, which a small vocabulary does not have.
    settings["model_type"] = variant.description.family.in_transformers or settings["model_type"]
    class_of_config = CONFIG_MAPPING[settings["model_type"]]
    settings = class_of_config._decode_special_floats({"pad_token_id": None, **settings})  # infinity, as it saves it
    config = class_of_config.from_dict(settings)
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        attention = "eager"
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    experts = variant.description.family.experts
    if experts is not None:
        separate_experts(skeleton, experts)
    return skeleton


def cut_tables(rotary: Any, length: int) -> Any:
    """The first positions of the tables of `rotary_tables`: of cos and sin, or of complex numbers (DeepSeek V2)."""
    if isinstance(rotary, tuple):
        return tuple(table[:, :length] for table in rotary)
    return None if rotary is None else rotary[:, :length]


def rotary_tables(
    skeleton: Any, variant: Variant, positions: "torch.Tensor", dtype: "torch.dtype"
) -> "dict[str | None, tuple[torch.Tensor, torch.Tensor] | None]":
    """Type of layers -> cos and sin [1, context, head_dim], None where all have one rope: by transformers' rotary
    module, with the frequencies of the file if it has its own (GGUF). None in a model without rope."""
    import torch

    if not variant.description.has_rope:
        return {None: None}
    module = _rotary_module(skeleton)
    types: list[str | None] = getattr(module, "layer_types", [None])
    for kind in types:
        own = variant.rotary(sliding=kind == "sliding_attention")
        if own is not None:
            prefix = "" if kind is None else f"{kind}_"
            setattr(module, f"{prefix}inv_freq", own[0])
            setattr(module, f"{prefix}attention_scaling", own[1])
            setattr(module, f"{prefix}original_inv_freq", own[0])
    module = module.to(positions.device)
    if hasattr(module, "mrope_section"):  # a position in text, in height and in width: in text they are one
        positions = positions.expand(3, 1, -1)
    like = torch.empty(0, dtype=dtype, device=positions.device)
    return {kind: module(like, positions, *(() if kind is None else (kind,))) for kind in types}


def _rotary_module(skeleton: Any) -> Any:
    """transformers' rotary module of a model, with its frequencies: on the meta device they have no values."""
    module = skeleton.model.rotary_emb if hasattr(skeleton.model, "rotary_emb") else skeleton.model.pos_emb
    return type(module)(config=skeleton.config)


def inverse_frequencies(variant: Variant) -> "tuple[torch.Tensor, float]":
    """(float32[head_dim / 2], factor): the rotation per position of a variant, as it will be computed; none without."""
    import torch

    if not variant.description.has_rope:
        return torch.empty(0), 1.0
    own = variant.rotary()
    if own is not None:
        return own
    skeleton = build_skeleton(variant)
    module = _rotary_module(skeleton)
    prefix = "full_attention_" if hasattr(module, "full_attention_inv_freq") else ""
    return getattr(module, f"{prefix}inv_freq").float(), float(getattr(module, f"{prefix}attention_scaling"))


def causal_mask(config: Any, layer: int, positions: "torch.Tensor") -> "torch.Tensor | None":
    """bool[1, 1, context, context], True where a position is seen; None for plain causal attention.

    A window as in transformers' masking_utils.py: a token sees itself and the sliding_window - 1 tokens before it.
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is not None and types[layer] != "sliding_attention":
        window = None
    if window is None or window >= positions.shape[1]:
        return None
    return _seen(positions, window)


def _seen(positions: "torch.Tensor", window: int) -> "torch.Tensor":
    distance = positions[0][:, None] - positions[0][None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def added_mask(mask: "torch.Tensor | None", positions: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """A mask of `causal_mask` as eager attention wants it: what is added to the scores."""
    import torch

    seen = _seen(positions, positions.shape[1]) if mask is None else mask
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


# Hidden states


def free_memory(device: str) -> int:
    """Bytes that are free on a device."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def allocate_hidden(shape: tuple[int, ...], dtype: "torch.dtype", setting: Setting) -> "torch.Tensor":
    """Room for hidden states: on the device, in memory, or mapped to a file that has no name, by what fits."""
    import torch

    nbytes = int(np.prod(shape)) * dtype.itemsize
    limit = free_memory(setting.device) // 4 if setting.memory_limit is None else setting.memory_limit
    if nbytes <= limit:
        return torch.empty(shape, dtype=dtype, device=setting.device)
    folder = setting.scratch
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="streamquant-hidden-", dir=folder)
    try:
        os.truncate(handle, nbytes)
        return torch.from_file(name, shared=True, size=int(np.prod(shape)), dtype=dtype).reshape(shape)
    except OSError as error:
        raise StreamquantError(
            "no room for the hidden states", where=name, found=error.strerror, required=f"{nbytes:,} bytes"
        ) from error
    finally:
        os.close(handle)
        Path(name).unlink()


# The head


class Head:
    """Final norm and output matrix of a variant: hidden states -> logits.

    Logits are float32 sums of products that are exact in float32, also where weights and hidden states are BF16: a
    BF16 head, as transformers has it, would round logits to three digits.
    """

    def __init__(self, lane: Lane, setting: Setting) -> None:
        import torch

        variant = lane.variant
        self.dtype, self.device = lane.torch_dtype(setting), torch.device(setting.device)
        skeleton = build_skeleton(variant)
        final_norm = variant.description.family.final_norm
        self.norm = skeleton.get_submodule(final_norm)
        self.divisor = getattr(skeleton.config, "logits_scaling", 1.0)
        observe = lane.on_weight
        name = variant.head_name
        on_block = None if observe is None else lambda first, block: observe(name, first, block)
        with errors_of(variant):
            weight = variant.read(f"{final_norm}.weight", self.dtype).to(self.device)
            self.norm.load_state_dict({"weight": weight}, assign=True)
            self.weight = variant.read(name, self.dtype, on_block).to(self.device)
        lane.bytes_read += variant.tensors[name].nbytes
        self.quantize = None
        if lane.quantizes_inputs(setting):
            self.quantize = variant.input_quantizer(name.removesuffix(".weight"))

    @property
    def nbytes(self) -> int:
        """Bytes of the output matrix in memory."""
        return int(self.weight.numel() * self.weight.element_size())

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """[rows, hidden_size] before the final norm -> float32[rows, vocabulary], on the device."""
        import torch

        with torch.inference_mode():
            x = self.norm(hidden.to(self.device, self.dtype))
            if self.quantize is not None:
                x = self.quantize(x[None])[0]
            if self.dtype == torch.float32:
                return torch.nn.functional.linear(x, self.weight) / self.divisor
            x = x.float()
            out = torch.empty((len(x), len(self.weight)), dtype=torch.float32, device=self.device)
            for first in range(0, len(self.weight), 8192):
                torch.matmul(x, self.weight[first : first + 8192].float().T, out=out[:, first : first + 8192])
            return out / self.divisor


def scored_positions(context: int) -> tuple[int, int]:
    """(first, stop) of the positions whose next token is scored: as llama-perplexity, the second half of each chunk.

    >>> scored_positions(512)
    (256, 511)
    """
    return context // 2, context - 1


def all_logits(variant: Variant, tokens: Tokens, setting: Setting) -> "torch.Tensor":
    """float32[chunks, context, vocabulary]: for small models and tests; nothing else holds logits whole."""
    import torch

    lane = Lane(variant)
    run_layers([lane], tokens, setting)
    head = Head(lane, setting)
    assert lane.hidden is not None
    return torch.stack([head.logits(rows) for rows in lane.hidden])
