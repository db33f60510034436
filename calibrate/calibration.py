"""Calibration by the layer-streamed pass: the ranges of inputs, keys and values that static scales are made of.

The pass is llm-compressor's first: BF16, eager attention, one sample at a time, nothing quantized; inputs by its
static_minmax (llmcompressor/observers/min_max.py), keys after rope and values where they would go into the cache. Its
second pass, in which layers see the inputs of quantized ones, leaves these statistics as they are: for schemes without
a search the weights of the layers before are the model's own (llmcompressor/pipelines/sequential/pipeline.py).

After a layer everything that the next ones need is written beside the output, so that a run that was interrupted goes
on behind that layer. The file is convert/recipes/calibration.py's.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamquant.calibrate.importance import InputSums, save_importance
from streamquant.calibrate.samples import Samples
from streamquant.convert.architectures import TensorRule
from streamquant.convert.recipes.calibration import (
    AMAX,
    CACHES,
    KIND,
    MEAN_SQUARE,
    TOKENS,
    VERSION,
    few_tokens_notes,
    is_calibrated,
    model_fingerprint,
    place_of,
)
from streamquant.files.hashing import quick_hash
from streamquant.files.listener import SILENT, Listener
from streamquant.files.reading import read_bytes
from streamquant.files.safetensors_file import SafetensorsTensor, read_header, write_header
from streamquant.files.writing import replacing
from streamquant.model.corpus import Corpus, TextFile
from streamquant.model.forward import Beginning, Lane, Setting, run_layers
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.quant.errors import StreamquantError, UsageError

if TYPE_CHECKING:
    import torch

STATE_SUFFIX = ".unfinished"
"""Behind the name of the output: what a run needs to go on."""
STATE_SHARE = 0.05
"""Share of a run's time that goes into writing it: after some layers nothing is written where it is large."""
_SUMS = ".input.sum_square"
_HIDDEN = "hidden"
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}
_NUMPY = {stored: np.dtype(name) for name, stored in _DTYPES.items()}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to calibrate.

    setting      how to compute; attention is eager and a batch one sample, whatever it says
    samples      how many, at most
    context      tokens of a sample, at most
    imatrix      a GGUF file to write too: the importance matrix of the same samples, for --imatrix and llama-quantize
    state_share  share of the time that may go into the state from which an interrupted run goes on
    """

    setting: Setting = field(default_factory=lambda: Setting(dtype="bf16"))
    samples: int = 512
    context: int = 2048
    imatrix: Path | None = None
    state_share: float = STATE_SHARE


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """What a run did."""

    path: Path
    samples: int
    tokens: int
    modules: int
    """Linear layers in the file, each expert one."""
    resumed_after: int | None
    """The last layer that an interrupted run had finished; None where there was none."""
    already_done: bool = False
    """Whether the file was there, of the same samples."""
    notes: tuple[str, ...] = ()
    """What a user should know of the samples, and of the experts that they hardly reached."""


class InputStatistics:
    """The ranges and sums of squares of inputs, by module; `observe` and `observe_cache` are those of a Lane."""

    def __init__(self, rules: Mapping[str, TensorRule]) -> None:
        """`rules` are those of the weights, by the HF names of their modules."""
        self.rules = rules
        self.arrays: Arrays = {}
        """As the state has them: amax F32[matrices], tokens I64[matrices], sums of squares F64[matrices, n]; k, v."""
        for rule in rules.values():
            name, _, count = place_of(rule)
            self.arrays[name + AMAX] = np.zeros(count, np.float32)
            self.arrays[name + TOKENS] = np.zeros(count, np.int64)
            self.arrays[name + _SUMS] = np.zeros((count, rule.shape[-1]), np.float64)
        self._last: tuple[torch.Tensor, np.float32, NDArray[np.float64]] | None = None

    def observe(self, name: str, x: "torch.Tensor") -> None:
        """Add an input [..., n]. q, k and v share one, and gate and up: it is looked at once."""
        rule = self.rules.get(name)
        if rule is None:
            return
        if self._last is None or self._last[0] is not x:
            flat = x.flatten(0, -2)
            squares = flat.float().square().sum(0).double().cpu().numpy()
            self._last = x, np.float32(flat.abs().amax().float().item()), squares
        _, amax, squares = self._last
        module, number, _ = place_of(rule)
        ranges = self.arrays[module + AMAX]
        ranges[number] = np.maximum(ranges[number], amax)  # NaN stays NaN
        self.arrays[module + TOKENS][number] += x.shape[:-1].numel()
        self.arrays[module + _SUMS][number] += squares

    def observe_cache(self, layer: int, keys: "torch.Tensor", values: "torch.Tensor") -> None:
        """Add what a layer would put into the key-value cache."""
        for kind, states in zip(CACHES, (keys, values), strict=True):
            amax = np.float32(states.abs().amax().float().item())
            held = self.arrays.setdefault(f"model.layers.{layer}.self_attn.{kind}.amax", np.zeros(1, np.float32))
            held[0] = np.maximum(held[0], amax)

    def check(self, layer: int) -> None:
        """Raise StreamquantError if something of a layer is NaN or infinite, or an input was not seen at all."""
        for name, values in self.arrays.items():
            if not name.startswith(f"model.layers.{layer}."):
                continue
            if not np.isfinite(values).all():
                raise StreamquantError(
                    "the inputs of a layer are NaN or infinite", where=name, hint="is the checkpoint whole? verify it"
                )
            if name.endswith(TOKENS) and len(values) == 1 and not values[0]:
                raise StreamquantError(
                    "the input of a layer was not seen", where=name, required="a linear layer that transformers calls"
                )

    def results(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The tensors of the file, sorted."""
        for name in sorted(self.arrays):
            if not name.endswith(_SUMS):
                yield name, self.arrays[name]
                continue
            module = name.removesuffix(_SUMS)
            counts = np.maximum(self.arrays[module + TOKENS], 1)[:, None]
            yield module + MEAN_SQUARE, (self.arrays[name] / counts).astype(np.float32)

    def importance(self) -> InputSums:
        """The sums of an importance matrix."""
        rules = {name: rule for name, rule in self.rules.items() if rule.has_importance}
        found = InputSums(rules)
        for rule in rules.values():
            module, number, _ = place_of(rule)
            for stored in rule.stored:
                tokens = int(self.arrays[module + TOKENS][number])
                found.add(stored, self.arrays[module + _SUMS][number], tokens)
        return found


def calibrate(
    variant: CheckpointVariant,
    samples: Samples,
    out: Path,
    options: CalibrationOptions | None = None,
    listener: Listener = SILENT,
) -> CalibrationRun:
    """Run a model over samples, one layer in memory at a time, and write what its inputs, keys and values were.

    The listener hears of "layers". A run that was interrupted goes on behind the last layer whose state was written.
    Raises StreamquantError for NaN or infinity, for a file in the place of the output or of the state that is of
    something else, and what reading raises.
    """
    options = options or CalibrationOptions()
    setting = replace(options.setting, attention="eager", weights_only=True)
    metadata = _metadata(variant, samples, setting)
    layers = variant.description.layer_count
    rules = {
        name.removesuffix(".weight"): rule
        for name, rule in variant.description.rules.items()
        if name in variant.tensors and is_calibrated(rule)
    }
    statistics = InputStatistics(rules)
    done = _is_done(out, metadata)
    state = _State(out.with_name(out.name + STATE_SUFFIX), _key(variant, metadata), statistics, options.state_share)
    begun = None if done else state.find()
    first = 0 if begun is None else begun.layer
    if done:
        if options.imatrix is not None:
            raise UsageError(
                "the calibration is there already, without its importance matrix",
                where=str(out),
                hint="name another --out, or remove the file",
            )
    else:
        listener.started("layers", layers - first)

        def finished(layer: int, hidden: "torch.Tensor") -> None:
            if layer >= 0:
                statistics.check(layer)
            if -1 < layer < layers - 1:
                state.write(layer, hidden)

        lane = Lane(variant, batch_tokens=1, on_input=statistics.observe, on_cache=statistics.observe_cache)
        lane.on_layer, lane.lengths, lane.beginning = finished, samples.lengths, begun
        run_layers([lane], samples.tokens, setting, listener)
        if options.imatrix is not None:
            _write_imatrix(options.imatrix, statistics, samples)
        _write(out, list(statistics.results()), metadata)
        state.remove()
    tokens = {name.removesuffix(TOKENS): counts for name, counts in statistics.arrays.items() if name.endswith(TOKENS)}
    notes = (*samples.notes, *(() if done else few_tokens_notes(tokens)))
    resumed = None if begun is None else begun.layer - 1
    return CalibrationRun(out, len(samples.lengths), samples.total, len(rules), resumed, done, notes)


def _metadata(variant: CheckpointVariant, samples: Samples, setting: Setting) -> dict[str, str]:
    import torch
    import transformers

    return {
        "format": KIND,
        "version": str(VERSION),
        "fingerprint": model_fingerprint(variant.checkpoint),
        "architecture": variant.description.hf_architecture,
        "samples": str(len(samples.lengths)),
        "context": str(samples.context),
        "tokens": str(samples.total),
        "tokens_sha256": samples.sha256(),
        "texts": json.dumps(samples.texts),
        "dtype": setting.dtype,
        "attention": setting.attention,
        "device": setting.device.partition(":")[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _key(variant: CheckpointVariant, metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([variant.fingerprint(), metadata], sort_keys=True).encode()).hexdigest()


def _is_done(out: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the output is there already. Raises StreamquantError if something else is in its place."""
    if not out.exists():
        return False
    _, found, _ = read_header(out)
    if different := [key for key, value in metadata.items() if found.get(key) != value]:
        raise StreamquantError(
            "the output file is another calibration, or none",
            where=str(out),
            found=f"{different[0]} {found.get(different[0])!r:.100}",
            required=f"no such file, or one with {different[0]} {metadata[different[0]]!r:.100}",
            hint="remove it, or name another --out",
        )
    return True


def _write(path: Path, arrays: list[tuple[str, NDArray[Any]]], metadata: Mapping[str, str]) -> None:
    header = write_header([(name, _DTYPES[str(a.dtype)], a.shape, a.nbytes) for name, a in arrays], metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(header)
            for _, array in arrays:
                file.write(array.tobytes())
    except OSError as error:
        raise StreamquantError("cannot write the calibration", where=str(path), found=error.strerror) from error


def _write_imatrix(path: Path, statistics: InputStatistics, samples: Samples) -> None:
    files = tuple(TextFile(Path(name), "", 0, 0) for name in samples.texts)
    save_importance(path, statistics.importance(), Corpus(samples.tokens, files, None), len(samples.tokens))


# The state of an unfinished run


class _State:
    """Hidden states after a layer and the statistics up to it, in one file that is replaced as a whole."""

    def __init__(self, path: Path, key: str, statistics: InputStatistics, share: float) -> None:
        self._path, self._key, self._statistics, self._share = path, key, statistics, share
        self._cost, self._written_at = 0.0, time.monotonic()

    def find(self) -> Beginning | None:
        """Take the statistics of a file that is there; where to go on. None without a file.

        Raises StreamquantError for one that is damaged, or of another model or other samples.
        """
        if not self._path.exists():
            return None
        tensors, metadata, _ = read_header(self._path)
        layer, arrays = metadata.get("layer", ""), self._statistics.arrays
        if metadata.get("key") != self._key or not layer.isdecimal() or _HIDDEN not in tensors:
            raise self._not_ours("a run over another model, other samples, or of other versions")
        stored = {name: tensor for name, tensor in tensors.items() if name != _HIDDEN}
        caches = {name for name in stored if name not in arrays and name.endswith(".amax")}
        wrong = [name for name, array in arrays.items() if name not in stored or stored[name].shape != array.shape]
        if wrong or stored.keys() - arrays.keys() - caches:
            raise self._not_ours("a run over another model")
        check = quick_hash()
        for tensor in tensors.values():
            for at in range(tensor.start, tensor.stop, _STEP):
                check.update(read_bytes(self._path, at, min(at + _STEP, tensor.stop)).data)
        if check.hexdigest() != metadata.get("check"):
            raise self._not_ours("bytes that are not as they were written")
        for name, tensor in stored.items():
            raw = read_bytes(self._path, tensor.start, tensor.stop)
            arrays[name] = raw.view(_NUMPY[tensor.dtype]).reshape(tensor.shape)
        hidden = tensors[_HIDDEN]
        return Beginning(int(layer) + 1, lambda into: self._fill(hidden, into))

    def _not_ours(self, found: str) -> StreamquantError:
        return StreamquantError(
            "an unfinished calibration that cannot be continued",
            where=str(self._path),
            found=found,
            required="the run that the same command began",
            hint="remove the file to begin again",
        )

    def _fill(self, stored: SafetensorsTensor, into: "torch.Tensor") -> None:
        import torch

        size = (stored.stop - stored.start) // len(into)
        for number in range(len(into)):
            raw = read_bytes(self._path, stored.start + number * size, stored.start + (number + 1) * size)
            into[number] = torch.from_numpy(raw).view(into.dtype).reshape(into.shape[1:])

    def write(self, layer: int, hidden: "torch.Tensor") -> None:
        """Write the state after a layer, if so much time has passed that the cost is a small share of it."""
        begun = time.monotonic()
        if begun - self._written_at < self._cost / self._share:
            return
        arrays = self._statistics.arrays
        check = quick_hash()
        for chunk in hidden:
            check.update(_raw(chunk).data)
        for array in arrays.values():
            check.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        dtype = {"bfloat16": "BF16", "float32": "F32"}[str(hidden.dtype).removeprefix("torch.")]
        nbytes = hidden.numel() * hidden.element_size()
        entries = [(_HIDDEN, dtype, tuple(hidden.shape), nbytes)]
        entries += [(name, _DTYPES[str(a.dtype)], a.shape, a.nbytes) for name, a in arrays.items()]
        header = write_header(entries, {"key": self._key, "layer": str(layer), "check": check.hexdigest()})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                file.write(header)
                for chunk in hidden:
                    file.write(_raw(chunk).data)
                for array in arrays.values():
                    file.write(array.tobytes())
        except OSError as error:
            raise StreamquantError(
                "cannot write the state of the calibration", where=str(self._path), found=error.strerror
            ) from error
        self._written_at = time.monotonic()
        self._cost = self._written_at - begun

    def remove(self) -> None:
        """The run is finished."""
        self._path.unlink(missing_ok=True)


_STEP = 64 << 20
"""Bytes that are read at a time."""


def _raw(tensor: "torch.Tensor") -> NDArray[np.uint8]:
    import torch

    raw: NDArray[np.uint8] = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return raw
