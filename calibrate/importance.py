"""Importance matrices by the layer-streamed pass: the sums of squares of every linear layer's input, as llama-imatrix.

For each weight W[out, in] and each token's input x: in_sum2[j] += x[j]^2, counts += 1 (tools/imatrix/imatrix.cpp of
llama.cpp); llama-quantize divides them. Weights outside the layers (embeddings, output) are left out, as llama-imatrix
does without --process-output. The sums are additive over tokens: a file is saved after every round of chunks, and a
later run goes on from it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray

from streamquant.convert.architectures import TensorRule
from streamquant.convert.architectures.tensor_view import resolve
from streamquant.convert.recipes.imatrix import unreached_notes
from streamquant.files.gguf_file import GgufKeys, pack_header, pad, read_header
from streamquant.files.listener import SILENT, Listener
from streamquant.files.reading import read_bytes
from streamquant.files.writing import replacing
from streamquant.model.corpus import Corpus
from streamquant.model.forward import Lane, Setting, Tokens, run_layers
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    import torch

TOKENS_KEY = "streamquant.imatrix.tokens_sha256"
"""SHA-256 of the tokens that were summed: only their continuation is added to a file. llama.cpp ignores the key."""


@dataclass(slots=True)
class InputSums:
    """Sums of squares of the inputs of linear layers; `observe` is a Lane.on_input."""

    rules: Mapping[str, TensorRule]
    """HF name of a linear layer -> the rule of its weight."""
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By GGUF name, float64[matrices, columns]: one matrix, or those of the experts that are stacked in the tensor."""
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By GGUF name, tokens of each matrix, int64[matrices]."""
    _last: "tuple[torch.Tensor, NDArray[np.float64]] | None" = None

    def observe(self, name: str, x: "torch.Tensor") -> None:
        """Add an input [..., n]. q, k and v share one, and gate and up: it is squared once. Columns are the GGUF's."""
        rule = self.rules.get(name)
        if rule is None:
            return
        if self._last is None or self._last[0] is not x:
            squares = x.flatten(0, -2).float().square().sum(0)
            self._last = x, squares.double().cpu().numpy()
        for stored in rule.stored:
            self.add(stored, self._last[1], x.shape[:-1].numel())

    def add(self, rule: TensorRule, squares: NDArray[np.float64], tokens: int) -> None:
        """Add sums of squares float64[n] to those of a stored tensor, or of one expert in it."""
        weight, matrices, number = rule.gguf_name, 1, 0
        if rule.expert is not None:
            matrices, number = rule.expert.count, rule.expert.number
        if weight not in self.sums:
            self.sums[weight] = np.zeros((matrices, squares.size))
            self.counts[weight] = np.zeros(matrices, np.int64)
        columns = resolve(rule.view, rule.shape).columns if rule.view is not None else None
        self.sums[weight][number] += squares if columns is None else squares[columns]
        self.counts[weight][number] += tokens

    def unreached(self) -> dict[str, list[int]]:
        """The experts that no token went through, by GGUF name."""
        found = {name: np.flatnonzero(of == 0).tolist() for name, of in self.counts.items() if of.size > 1}
        return {name: experts for name, experts in found.items() if experts}

    def check(self) -> None:
        """Raise StreamquantError if a sum is NaN or infinite."""
        for name, values in self.sums.items():
            if not np.isfinite(values).all():
                raise StreamquantError(
                    "the inputs of a layer are NaN or infinite",
                    where=f"tensor {name!r}, column {int(np.argmin(np.isfinite(values).all(0)))}",
                    hint="is the checkpoint whole? verify it",
                )


@dataclass(frozen=True, slots=True)
class ImportanceRun:
    """What a run did."""

    path: Path
    chunks: int
    """Chunks in the file now."""
    resumed_from: int
    """Chunks that were in the file before."""
    entries: int
    bytes_read: int
    notes: tuple[str, ...] = ()
    """What a user should know of the texts, and of the experts that they did not reach."""


@dataclass(frozen=True, slots=True)
class ImportanceOptions:
    """How to compute an importance matrix.

    save_every     chunks after which the file is saved; every round reads all weights once. None: one round
    parse_special  special tokens in the texts are tokens and not letters, as with llama-imatrix's --parse-special
    """

    setting: Setting = field(default_factory=Setting)
    save_every: int | None = None
    parse_special: bool = False


def write_importance(
    variant: Variant,
    corpus: Corpus,
    out: Path,
    options: ImportanceOptions | None = None,
    listener: Listener = SILENT,
) -> ImportanceRun:
    """Compute the importance matrix of a model over a corpus, and write it to `out` in llama.cpp's GGUF format.

    A file that is there already is continued if it is of the beginning of the same tokens. Inputs are summed before the
    runtime of a quantized model would quantize them, as there. The listener hears of "layers", of all rounds together.
    Raises StreamquantError if the file is another's, for NaN or infinity, and what reading raises.
    """
    options = options or ImportanceOptions()
    rules = {
        rule.hf_name.removesuffix(".weight"): rule for rule in variant.description.rules.values() if rule.has_importance
    }
    sums = InputSums(rules)
    before = _resume(out, corpus, sums) if out.exists() else 0
    step = options.save_every or max(1, len(corpus.tokens))
    rounds = [(at, min(at + step, len(corpus.tokens))) for at in range(before, len(corpus.tokens), step)]
    listener.started("layers", len(rounds) * variant.description.layer_count)
    bytes_read = 0
    for first, last in rounds:
        lane = Lane(variant, on_input=sums.observe)
        run_layers([lane], corpus.tokens[first:last], options.setting, listener)
        bytes_read += lane.bytes_read
        sums.check()
        save_importance(out, sums, corpus, last)
    chunks = max(before, len(corpus.tokens))
    notes = (*corpus.notes, *unreached_notes(sums.unreached()))
    return ImportanceRun(out, chunks, before, len(sums.sums), bytes_read, notes)


def tokens_sha256(tokens: Tokens) -> str:
    """Of int64[chunks, context]."""
    return hashlib.sha256(f"{tokens.shape[1]}".encode() + tokens.astype("<i8").tobytes()).hexdigest()


def save_importance(path: Path, sums: InputSums, corpus: Corpus, chunks: int) -> None:
    """Write the sums of the first `chunks` chunks of a corpus; the file has its name when it is complete."""
    metadata = {
        "general.type": GGUFValue("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": GGUFValue(
            [file.path.name for file in corpus.files], GGUFValueType.ARRAY, GGUFValueType.STRING
        ),
        "imatrix.chunk_count": GGUFValue(chunks, GGUFValueType.UINT32),
        "imatrix.chunk_size": GGUFValue(corpus.context, GGUFValueType.UINT32),
        TOKENS_KEY: GGUFValue(tokens_sha256(corpus.tokens[:chunks]), GGUFValueType.STRING),
    }
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(sums.sums):
        # ggml does not count dimensions of 1
        matrices = len(sums.counts[name])
        arrays[f"{name}.in_sum2"] = sums.sums[name].astype(np.float32).reshape((matrices, -1) if matrices > 1 else -1)
        arrays[f"{name}.counts"] = sums.counts[name].astype(np.float32).reshape((matrices, 1) if matrices > 1 else -1)
    header = pack_header(metadata, [(name, array.shape, "F32", array.nbytes) for name, array in arrays.items()])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(header)
            for array in arrays.values():
                file.write(array.tobytes() + bytes(pad(array.nbytes) - array.nbytes))
    except OSError as error:
        raise StreamquantError("cannot write the importance matrix", where=str(path), found=error.strerror) from error


def _resume(path: Path, corpus: Corpus, sums: InputSums) -> int:
    """Take the sums of a file that this corpus continues; the number of its chunks."""
    header = read_header(path)
    keys = GgufKeys(path, header.metadata)
    chunks, size = keys.whole("imatrix.chunk_count"), keys.whole("imatrix.chunk_size")
    same = (
        keys.text("general.type") == "imatrix"
        and size == corpus.context
        and chunks is not None
        and 0 < chunks < 2**32
        and keys.text(TOKENS_KEY) == tokens_sha256(corpus.tokens[:chunks])
    )
    if not same or chunks is None:
        raise StreamquantError(
            "the file is not the beginning of this importance matrix",
            where=str(path),
            found=f"{chunks} chunks of {size} tokens of other texts, or of another program",
            required="no such file, or one of the same texts, tokenizer and context",
            hint="remove it, or name another --out",
        )
    weights = {stored.gguf_name: stored for rule in sums.rules.values() for stored in rule.stored}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rule in weights.items():
        stack = (rule.expert.count,) if rule.expert is not None else ()
        shapes |= {f"{name}.in_sum2": (*stack, rule.shape[1]), f"{name}.counts": (*stack, 1)}
    found = {tensor.name: tensor for tensor in header.tensors if tensor.stored_as == "F32"}
    if wrong := sorted(
        name for name in shapes.keys() | found.keys() if name not in found or found[name].shape != shapes.get(name)
    ):
        raise StreamquantError(
            "the file is of another model", where=str(path), found=f"{wrong[0]!r:.200}", required="its weights"
        )
    tokens = min(chunks, len(corpus.tokens)) * corpus.context
    for name, rule in weights.items():
        total, counts = (
            read_bytes(path, tensor.start, tensor.stop).view(np.float32)
            for tensor in (found[f"{name}.in_sum2"], found[f"{name}.counts"])
        )
        if rule.expert is not None:  # an expert sees the tokens that choose it
            are_possible = bool((counts >= 0).all() and (counts <= tokens).all())
        else:
            are_possible = bool(counts[0] == np.float32(tokens))
        if not (np.isfinite(total).all() and (total >= 0).all() and are_possible):
            raise StreamquantError(
                "sums that no run has written",
                where=f"{path}, {name!r}",
                found=f"a sum that is negative or not finite, or a count of {counts.max():g}",
                required=f"sums of squares over {tokens:,} tokens",
                hint="remove the file, or name another --out",
            )
        sums.sums[name] = total.astype(np.float64).reshape(len(counts), -1)
        sums.counts[name] = counts.astype(np.int64)
    return chunks
