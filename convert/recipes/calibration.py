"""Calibration files of `streamquant calibrate`: what the inputs of linear layers, keys and values were over some texts.

One safetensors file (docs/calibration.md):

| tensor                      | dtype and shape       | what                                                       |
|-----------------------------|-----------------------|------------------------------------------------------------|
| MODULE.input.amax           | F32 [matrices]        | largest magnitude of the module's input                    |
| MODULE.input.mean_square    | F32 [matrices, n]     | mean of x^2 of each column                                 |
| MODULE.input.tokens         | I64 [matrices]        | tokens that went through the module                        |
| LAYER.self_attn.k.amax      | F32 [1]               | largest magnitude of keys, after rope; v likewise          |

A module is one matrix. Of the experts of a layer, one projection is one tensor, without the expert's number in its
name: a row for each expert, in their order. An expert that no token went through has 0 in all of them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.convert.architectures import ModelDescription, TensorKind, TensorRule
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.hashing import sha256_of
from streamquant.files.json_record import JsonRecord
from streamquant.files.reading import read_bytes
from streamquant.files.safetensors_file import SafetensorsTensor, read_header
from streamquant.files.sizes import shortened
from streamquant.quant.errors import StreamquantError

KIND = "streamquant-calibration"
"""The metadata's `format`."""
VERSION = 1
"""The metadata's `version`: raise it when a file says what earlier readers would take for something else."""
AMAX, MEAN_SQUARE, TOKENS = ".input.amax", ".input.mean_square", ".input.tokens"
CACHES = ("k", "v")
SAMPLE = 4096
"""Bytes of each tensor that `model_fingerprint` looks at."""
SAMPLED = 8
"""Matrices that it looks into."""
FEW_TOKENS = 64
"""An expert that fewer tokens went through is named: its largest input is a matter of chance."""
_INCIDENTAL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "quantization_config",
    }
)
"""Keys of config.json that do not change what a model computes, or that tell of its storage."""
_BROKEN = "not a readable calibration file"
_MAKE = "make it with `streamquant calibrate`"


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """What a manifest says of a calibration file, and what the keys of a repetition need."""

    file: str
    """Name, without its folder."""
    sha256: str
    samples: int
    context: int
    """Tokens of a sample, at most."""
    tokens: int
    """Of all samples together."""
    texts: tuple[str, ...]
    """Names of the files that the samples are from."""

    def json(self) -> dict[str, Any]:
        """As in a manifest; `parse_calibration` is the inverse."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "samples": self.samples,
            "context": self.context,
            "tokens": self.tokens,
            "texts": list(self.texts),
        }

    def words(self) -> list[str]:
        """As on a command line."""
        return ["--calibration", PurePosixPath(self.file).name]


def parse_calibration(record: JsonRecord) -> CalibrationRecord:
    """The inverse of `CalibrationRecord.json`. Raises StreamquantError for a value of another kind."""
    return CalibrationRecord(
        record.text("file"),
        record.text("sha256"),
        record.count("samples"),
        record.count("context"),
        record.count("tokens"),
        record.texts("texts"),
    )


@dataclass(frozen=True, slots=True)
class InputRange:
    """The input of a linear layer."""

    amax: float
    """Largest magnitude."""
    tokens: int
    """Tokens that went through it."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration file: what conversions need of it."""

    record: CalibrationRecord
    fingerprint: str
    """`model_fingerprint` of the model that was calibrated."""
    amax: Mapping[str, NDArray[np.float32]] = field(repr=False)
    """By module, of experts without their number: float32[matrices], finite and not negative."""
    tokens: Mapping[str, NDArray[np.int64]] = field(repr=False)
    """Likewise int64[matrices]."""
    caches: Mapping[int, tuple[float, float]] = field(repr=False)
    """Layer -> largest magnitude of its keys and of its values."""

    def input_of(self, rule: TensorRule) -> InputRange:
        """The input of the module of a weight. An expert that no token went through takes the largest of its layer's.

        Raises StreamquantError if the file has nothing of the module.
        """
        name, number, _ = place_of(rule)
        ranges = self.amax.get(name)
        if ranges is None or number >= len(ranges):
            raise self._of_another(f"no {name}{AMAX}")
        tokens = int(self.tokens[name][number])
        return InputRange(float(ranges[number] if tokens else ranges.max()), tokens)

    def cache_of(self, layer: int) -> tuple[float, float]:
        """Largest magnitude of keys and values of a layer. Raises StreamquantError if the file has none."""
        found = self.caches.get(layer)
        if found is None:
            raise self._of_another(f"no model.layers.{layer}.self_attn.k.amax")
        return found

    def check(self, checkpoint: Checkpoint, model: ModelDescription) -> None:
        """Raise StreamquantError if the file is not of this model: of one with other modules, or with other weights."""
        rules = (rule for name, rule in model.rules.items() if name in checkpoint.tensors and is_calibrated(rule))
        wanted = {name: count for name, _, count in map(place_of, rules)}
        missing = [name for name in wanted if name not in self.amax]
        if missing:
            raise self._of_another(f"no {shortened([name + AMAX for name in missing], 3)}")
        if unknown := [name for name in self.amax if name not in wanted]:
            raise self._of_another(f"{shortened([name + AMAX for name in unknown], 3)}, which this model does not have")
        for name, count in wanted.items():
            if len(self.amax[name]) != count:
                raise self._of_another(f"{len(self.amax[name])} values of {name}{AMAX} for {count} matrices")
        if self.fingerprint != (own := model_fingerprint(checkpoint)):
            raise self._of_another(f"the fingerprint {self.fingerprint[:16]}", f"{own[:16]}, that of this model")

    def _of_another(self, found: str, required: str = "the file that was made of this model") -> StreamquantError:
        return StreamquantError(
            "calibration of another model", where=self.record.file, found=found, required=required, hint=_MAKE
        )

    def notes(self) -> tuple[str, ...]:
        """A warning that names the experts that few tokens went through; none if there are none.

        An expert without a token takes the largest input of the experts of its layer.
        """
        return few_tokens_notes(self.tokens)


def few_tokens_notes(tokens: Mapping[str, NDArray[np.int64]]) -> tuple[str, ...]:
    """A warning that names the experts, by layer, that fewer than FEW_TOKENS tokens went through.

    >>> few_tokens_notes({"model.layers.3.mlp.experts.up_proj": np.array([900, 0, 63])})[0][:86]
    'WARNING: fewer than 64 tokens went through 2 experts: model.layers.3.mlp.experts 1 (0 '
    """
    layers: dict[str, dict[int, int]] = {}
    for name, counts in tokens.items():
        if len(counts) > 1:
            few = np.flatnonzero(counts < FEW_TOKENS)
            layers.setdefault(name.rpartition(".")[0], {}).update({int(at): int(counts[at]) for at in few})
    named = [
        f"{layer} {shortened([f'{number} ({few[number]} tokens)' for number in sorted(few)], 8)}"
        for layer, few in layers.items()
        if few
    ]
    if not named:
        return ()
    count = sum(len(few) for few in layers.values())
    return (
        f"WARNING: fewer than {FEW_TOKENS} tokens went through {count} experts: {shortened(named, 8, '; ')}. "
        "Those without any take the largest input of their layer's; more or other samples reach them",
    )


def is_calibrated(rule: TensorRule) -> bool:
    """Whether a calibration has the input of a weight: the matrices of the layers that inputs are multiplied with."""
    others = (TensorKind.ROUTER, TensorKind.STATE_INPUT, TensorKind.LATENT)
    return rule.layer >= 0 and not rule.is_mtp and (rule.kind.is_linear or rule.kind in others)


def place_of(rule: TensorRule) -> tuple[str, int, int]:
    """(module's name in a calibration, number of its matrix, number of matrices) of a weight."""
    name = rule.hf_name.removesuffix(".weight")
    if rule.expert is None:
        return name, 0, 1
    experts, _, projection = name.rpartition(f".{rule.expert.number}.")
    return f"{experts}.{projection}", rule.expert.number, rule.expert.count


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what a model computes with, so far as it can be told without reading all weights.

    That is: what of config.json matters, name, dtype and shape of each tensor, and 4 KiB from the middle of some
    matrices and of the last norm. It does not depend on how the tensors are spread over shards.
    """
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.name)
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    picked = [matrices[at] for at in np.linspace(0, len(matrices) - 1, min(SAMPLED, len(matrices))).astype(int)]
    picked += [tensor for tensor in tensors if tensor.name == "model.norm.weight"]
    config = {key: value for key, value in checkpoint.config.items() if key not in _INCIDENTAL}
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    found.update(json.dumps([[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]).encode())
    for tensor in picked:
        first = next(tensor.parts)
        start = max(first.start, (first.start + first.stop - SAMPLE) // 2)
        found.update(checkpoint.read_range(first.file, start, min(start + SAMPLE, first.stop)))
    return found.hexdigest()


# Reading


def read_calibration(path: str | Path) -> Calibration:
    """Read a calibration file.

    Raises StreamquantError if it cannot be read, is none or of another version, and for values that are missing,
    negative or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise StreamquantError("no calibration file here", where=str(path), required="a safetensors file", hint=_MAKE)
    tensors, metadata, _ = read_header(path)
    return _Reader(path, tensors, metadata).read()


@dataclass(frozen=True, slots=True)
class _Reader:
    path: Path
    tensors: Mapping[str, SafetensorsTensor]
    metadata: Mapping[str, str]

    def read(self) -> Calibration:
        if self.metadata.get("format") != KIND or self.metadata.get("version") != str(VERSION):
            found = f"format {self.metadata.get('format')!r:.100}, version {self.metadata.get('version')!r:.100}"
            raise self.broken(found, f"format {KIND!r}, version {VERSION}")
        amax = {name: self.amax(name + AMAX) for name in self.modules()}
        tokens = {name: self.counts(name, len(ranges)) for name, ranges in amax.items()}
        for name, ranges in amax.items():
            self.check_mean_squares(name, len(ranges))
            if (ranges[tokens[name] == 0] != 0).any():
                raise self.broken(f"{name}{AMAX} of no token", "0 where no token went through")
            if not tokens[name].any():
                raise self.broken(f"no token went through {name}", "a token for one matrix at least")
        if not amax:
            raise self.broken(f"no tensor ends in {AMAX}", "the inputs of a model's linear layers")
        samples, context, total = map(self.number, ("samples", "context", "tokens"))
        record = CalibrationRecord(self.path.name, sha256_of(self.path), samples, context, total, self.texts())
        return Calibration(record, self.text("fingerprint"), amax, tokens, dict(self.caches()))

    def modules(self) -> Iterator[str]:
        for name in self.tensors:
            for end in (AMAX, MEAN_SQUARE, TOKENS):
                if name.endswith(end) and (module := name.removesuffix(end)) + AMAX not in self.tensors:
                    raise self.broken(f"{name}, but no {module}{AMAX}", "both")
            if name.endswith(AMAX):
                yield name.removesuffix(AMAX)

    def caches(self) -> Iterator[tuple[int, tuple[float, float]]]:
        for name in self.tensors:
            head, layers, rest = name.partition("model.layers.")
            number, _, end = rest.partition(".")
            if not head and layers and end == "self_attn.k.amax" and number.isdigit():
                values = [self.amax(f"model.layers.{number}.self_attn.{kind}.amax") for kind in CACHES]
                if any(len(value) != 1 for value in values):
                    raise self.broken(f"{[len(value) for value in values]} values of {name} and v", "one of each")
                yield int(number), (float(values[0][0]), float(values[1][0]))

    def tensor(self, name: str, dtype: str) -> SafetensorsTensor:
        found = self.tensors.get(name)
        if found is None:
            raise self.broken(f"no {name}", "amax, mean square and tokens of each module, and of k and v of a layer")
        if found.dtype != dtype or not found.shape or not math.prod(found.shape):
            raise self.broken(f"{name}: {found.dtype}{list(found.shape)}", f"{dtype}, one value or more")
        return found

    def amax(self, name: str) -> NDArray[np.float32]:
        found = self.tensor(name, "F32")
        values = read_bytes(self.path, found.start, found.stop).view("<f4").astype(np.float32)
        if found.shape != values.shape:
            raise self.broken(f"{name}: F32{list(found.shape)}", "a value for each matrix")
        return self.checked(name, values)

    def checked(self, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if not (np.isfinite(values).all() and (values >= 0).all()):
            worst = values[~(np.isfinite(values) & (values >= 0))][0]
            raise self.broken(f"{name}: {worst:g}", "values that are finite and not negative")
        return values

    def check_mean_squares(self, module: str, matrices: int) -> None:
        found = self.tensor(module + MEAN_SQUARE, "F32")
        if len(found.shape) != 2 or found.shape[0] != matrices:
            raise self.broken(f"{module}{MEAN_SQUARE}: F32{list(found.shape)}", f"[{matrices}, n]")
        self.checked(module + MEAN_SQUARE, read_bytes(self.path, found.start, found.stop).view("<f4"))

    def counts(self, module: str, matrices: int) -> NDArray[np.int64]:
        found = self.tensor(module + TOKENS, "I64")
        values = read_bytes(self.path, found.start, found.stop).view("<i8").astype(np.int64)
        if found.shape != (matrices,) or (values < 0).any() or (values > self.number("tokens")).any():
            raise self.broken(f"{module}{TOKENS}: {values[:8].tolist()}", f"{matrices} counts of the file's tokens")
        return values

    def text(self, key: str) -> str:
        if not (found := self.metadata.get(key)):
            raise self.broken(f"no {key} in its metadata", f"{key}, as `streamquant calibrate` writes it")
        return found

    def number(self, key: str) -> int:
        found = self.text(key)
        if not (found.isdecimal() and found.isascii() and len(found) < 19 and int(found)):
            raise self.broken(f"{key} {found!r:.100}", "a whole number, 1 or more")
        return int(found)

    def texts(self) -> tuple[str, ...]:
        try:
            found = json.loads(self.text("texts"))
        except (json.JSONDecodeError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise self.broken(f"texts {self.text('texts')!r:.100}", "a list of names")
        return tuple(found)

    def broken(self, found: str, required: str) -> StreamquantError:
        return StreamquantError(_BROKEN, where=str(self.path), found=found, required=required, hint=_MAKE)
