"""What is kept of the hidden states: final ones at the scored positions, and samples after every layer.

From the final hidden states the head makes logits again, whenever they are wanted, so they are all that has to be kept
of the original: a hidden_size a token instead of a vocabulary, and exact. The cache is one safetensors file, named by a
hash of everything that its values depend on.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamquant.files.folders import cache_folder
from streamquant.files.safetensors_file import read_header, write_header
from streamquant.files.writing import replacing
from streamquant.model.forward import Lane, Setting, Tokens, scored_positions
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch

SAMPLES = 256
"""Positions whose hidden states are compared after every layer."""
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
CACHE_VERSION = 1
CACHE_BYTES = 20 << 30
"""Bytes of hidden states that stay in the cache."""


def sample_positions(chunks: int, context: int, count: int = SAMPLES) -> NDArray[np.int64]:
    """int64[s], s <= count: positions in the flattened tokens, spread evenly over the scored ones."""
    first, stop = scored_positions(context)
    scored = (np.arange(chunks)[:, None] * context + np.arange(first, stop)).reshape(-1)
    return scored[np.unique(np.linspace(0, len(scored) - 1, count).astype(np.int64))]


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a variant's hidden states are from the original's after a layer, over the sampled tokens.

    layer -1 is the embeddings. relative_error is the mean of |h' - h| / |h| of a token, cosine the mean of
    cos(h', h).
    """

    layer: int
    relative_error: float
    cosine: float


def layer_error(layer: int, original: "torch.Tensor", variant: "torch.Tensor") -> LayerError:
    """Compare hidden states [s, n] of the same tokens."""
    import torch

    a, b = original.double(), variant.double()
    size = a.norm(dim=-1).clamp_min(1e-300)
    relative = ((b - a).norm(dim=-1) / size).mean()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-300).mean()
    return LayerError(layer, float(relative), float(cosine))


class HiddenStates:
    """Final hidden states of a model at the scored positions, before the final norm, and samples after each layer."""

    def __init__(self, lane: Lane, context: int) -> None:
        self.lane = lane
        self.first, self.stop = scored_positions(context)
        self.samples: list[torch.Tensor] = []
        """[s, n] after the embeddings, after layer 0, ..."""

    def chunks(self, first: int, last: int) -> "torch.Tensor":
        """[scored tokens of chunks first to last, n]."""
        assert self.lane.hidden is not None
        return self.lane.hidden[first:last, self.first : self.stop].flatten(0, 1)

    def sample(self, layer: int) -> "torch.Tensor":
        """[s, n] after a layer; -1 is the embeddings."""
        return self.samples[layer + 1]


class CachedHiddenStates(HiddenStates):
    """The same, from a file of the cache."""

    def __init__(self, lane: Lane, context: int, path: Path) -> None:
        from safetensors import safe_open

        super().__init__(lane, context)
        self._file = safe_open(path, framework="pt")
        file: Any = self._file
        self._hidden, self._samples = file.get_slice("hidden"), file.get_slice("samples")

    def chunks(self, first: int, last: int) -> "torch.Tensor":
        """See HiddenStates.chunks."""
        return self._hidden[first:last].flatten(0, 1)

    def sample(self, layer: int) -> "torch.Tensor":
        """See HiddenStates.sample."""
        return self._samples[layer + 1]


def cache_key(lane: Lane, tokens: Tokens, setting: Setting) -> str:
    """SHA-256 over the checkpoint, the tokens, and what else the values depend on."""
    import torch
    import transformers

    described: dict[str, Any] = {
        "version": CACHE_VERSION,
        "checkpoint": lane.variant.fingerprint(),
        "tokens": hashlib.sha256(f"{tokens.shape}".encode() + tokens.astype("<i8").tobytes()).hexdigest(),
        "dtype": lane.dtype or setting.dtype,
        "device": setting.device.partition(":")[0],
        "weights_only": not lane.quantizes_inputs(setting),
        "samples": SAMPLES,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def default_cache() -> Path:
    """The folder for hidden states of originals in the user's cache."""
    return cache_folder() / "hidden-states"


def prune_cache(folder: Path, keep_bytes: int = CACHE_BYTES) -> None:
    """Remove the oldest hidden states of a cache folder until `keep_bytes` are left; the newest stays."""
    files = sorted(folder.glob("hidden-states-*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for number, path in enumerate(files):
        total += path.stat().st_size
        if number and total > keep_bytes:
            path.unlink(missing_ok=True)


def cache_path(folder: Path, key: str) -> Path:
    """The file of a key."""
    return folder / f"hidden-states-{key[:32]}.safetensors"


def open_cached(folder: Path, key: str, lane: Lane, context: int) -> CachedHiddenStates | None:
    """The states kept under a key, None if there are none. A file that is broken counts as none."""
    path = cache_path(folder, key)
    if not path.is_file():
        return None
    try:
        tensors, metadata, _ = read_header(path)
    except StreamquantError:
        return None
    if metadata.get("key") != key or tensors.keys() != {"hidden", "samples"}:
        return None
    return CachedHiddenStates(lane, context, path)


def write_cached(folder: Path, key: str, states: HiddenStates) -> Path:
    """Write what is kept of a model, chunk by chunk; the file has its name when it is complete."""
    hidden = states.lane.hidden
    assert hidden is not None
    chunks, n = hidden.shape[0], hidden.shape[2]
    dtype = DTYPES[str(hidden.dtype).removeprefix("torch.")]
    shapes = {
        "hidden": (chunks, states.stop - states.first, n),
        "samples": (len(states.samples), len(states.samples[0]), n),
    }
    sizes = {name: int(np.prod(shape)) * hidden.element_size() for name, shape in shapes.items()}
    header = write_header([(name, dtype, shapes[name], sizes[name]) for name in shapes], {"key": key})
    folder.mkdir(parents=True, exist_ok=True)
    path = cache_path(folder, key)
    try:
        with replacing(path, shared=True) as file:
            file.write(header)
            for chunk in range(chunks):
                file.write(_bytes(states.chunks(chunk, chunk + 1)))
            for sample in states.samples:
                file.write(_bytes(sample))
    except OSError as error:
        raise StreamquantError("cannot write the cache", where=str(path), found=error.strerror) from error
    return path


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    return bytes(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
