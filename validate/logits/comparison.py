"""Compare variants with their original over the same tokens: one layer-streamed pass, then the head, then statistics.

`compare` is the function; the dataclasses that it returns hold everything that a report needs, and nothing else.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from streamquant.files.listener import SILENT, Listener
from streamquant.model.corpus import Corpus, TextFile
from streamquant.model.errors import errors_of
from streamquant.model.forward import (
    DType,
    Head,
    Lane,
    Setting,
    check_tokens,
    count_layers,
    inverse_frequencies,
    release_memory,
    run_layers,
    scored_positions,
)
from streamquant.model.problem import Problem
from streamquant.model.variants.variant import Kind, Variant
from streamquant.quant.errors import StreamquantError
from streamquant.validate.logits.divergence import (
    Divergence,
    Likelihood,
    LogitRows,
    TokenScores,
    divergence,
    likelihood,
    prepare_rows,
    score_rows,
)
from streamquant.validate.logits.hidden_states import (
    HiddenStates,
    LayerError,
    cache_key,
    layer_error,
    open_cached,
    sample_positions,
    write_cached,
)
from streamquant.validate.logits.weights import TensorError, WeightErrors, doubtful_tensors

if TYPE_CHECKING:
    import torch

NoiseKind = Literal["dtype", "batch"]
ROWS = 512
"""Scored tokens whose logits are in memory at a time, about; whole chunks."""
SCORING = "logits and divergence"
"""The task of the listener beside "layers"."""
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class TypeShare:
    """How much of a variant is stored in a type."""

    stored_as: str
    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model as it lies on disk."""

    label: str
    path: str
    kind: Kind
    architecture: str
    """transformers' class."""
    layers: int
    parameters: int
    nbytes: int
    """Of all tensors; a file has its metadata on top."""
    bits_per_weight: float
    types: tuple[TypeShare, ...]
    """Largest share first."""


@dataclass(frozen=True, slots=True)
class VariantResult:
    """What is known of a variant after the comparison."""

    model: ModelSummary
    dtype: DType
    """In which it was computed."""
    activations: str | None
    """How the runtime quantizes the inputs of linear layers, None where it does not."""
    activations_emulated: bool
    problems: tuple[Problem, ...]
    overall: Divergence
    by_category: Mapping[str, Divergence]
    """One for each text, in their order."""
    chunk_kld: tuple[float, ...]
    """Mean KL of each chunk, nats per token."""
    layers: tuple[LayerError, ...]
    tensors: tuple[TensorError, ...]
    """Empty if they were not measured."""


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The original against itself, computed in another way: differences below this mean nothing."""

    kind: NoiseKind
    what: str
    overall: Divergence
    layers: tuple[LayerError, ...]


@dataclass(frozen=True, slots=True)
class OriginalResult:
    """The reference itself."""

    model: ModelSummary
    dtype: DType
    problems: tuple[Problem, ...]
    overall: Likelihood
    by_category: Mapping[str, Likelihood]


@dataclass(frozen=True, slots=True)
class Effort:
    """What the comparison took."""

    seconds_layers: float
    seconds_head: float
    tokens: int
    """Tokens that went through every model."""
    bytes_read: int
    """Stored bytes of weights that were read, over all models."""
    models: int
    original_cached: bool
    """Whether the original's hidden states came from the cache."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`."""

    original: OriginalResult
    variants: tuple[VariantResult, ...]
    noise_floors: tuple[NoiseFloor, ...]
    files: tuple[TextFile, ...]
    corpus_sha256: str
    context: int
    chunks: int
    scored_tokens: int
    scored_positions: tuple[int, int]
    """[first, stop) within a chunk: the logits there are scored on the next token."""
    bos: int | None
    dtype: DType
    device: str
    weights_only: bool
    threads: int
    versions: Mapping[str, str]
    effort: Effort


@dataclass(frozen=True, slots=True)
class ComparisonOptions:
    """How to compare.

    noise    noise floors to measure: compute the original once more in the other dtype, or chunk by chunk
    tensors  measure the error of every tensor
    cache    folder for the original's hidden states; they are reused for the same checkpoint, tokens and dtype
    """

    setting: Setting = field(default_factory=Setting)
    noise: tuple[NoiseKind, ...] = ()
    tensors: bool = True
    cache: Path | None = None


@dataclass(eq=False)
class _Entry:
    """A lane with what is collected for it."""

    lane: Lane
    states: HiddenStates
    weights: WeightErrors | None = None
    layers: list[LayerError] = field(default_factory=list)
    scores: list[TokenScores] = field(default_factory=list)


def compare(
    original: Variant,
    variants: Sequence[Variant],
    corpus: Corpus,
    options: ComparisonOptions | None = None,
    listener: Listener = SILENT,
) -> Comparison:
    """Run the original and all variants over the corpus in lock step, and compare.

    Raises VariantError, which names the variant, where one cannot be read or compared (another vocabulary). All other
    differences become problems of the variant.
    """
    import torch

    options = options or ComparisonOptions()
    setting, cache = options.setting, options.cache
    for variant in variants:
        check_comparable(original, variant)
    tokens = corpus.tokens
    base = Lane(original)
    check_tokens([base], tokens)
    key = cache_key(base, tokens, setting) if cache is not None else ""
    found = open_cached(cache, key, base, corpus.context) if cache is not None else None
    states = found or HiddenStates(base, corpus.context)
    entries = [_entry(original, variant, corpus, options.tensors) for variant in variants]
    floors = [(kind, _noise_entry(kind, original, corpus, setting)) for kind in options.noise]
    others = [*entries, *(entry for _, entry in floors)]
    start = time.perf_counter()
    _observe_layers(states, others, corpus, from_cache=found is not None)
    running = [*([] if found is not None else [base]), *(entry.lane for entry in others)]
    listener.started("layers", count_layers(running))
    if running:
        run_layers(running, tokens, setting, listener)
    if cache is not None and found is None:
        write_cached(cache, key, states)
    middle = time.perf_counter()
    base_nll = _score(states, others, corpus, setting, listener)
    lanes = [base, *(entry.lane for entry in others)]
    return Comparison(
        original=_original_result(original, base_nll, corpus, setting),
        variants=tuple(_variant_result(original, entry, base_nll, corpus, setting) for entry in entries),
        noise_floors=tuple(_noise_floor(kind, entry, base_nll, corpus, setting) for kind, entry in floors),
        files=corpus.files,
        corpus_sha256=corpus.sha256(),
        context=corpus.context,
        chunks=len(tokens),
        scored_tokens=len(base_nll),
        scored_positions=scored_positions(corpus.context),
        bos=corpus.bos,
        dtype=setting.dtype,
        device=torch.cuda.get_device_name(setting.device) if setting.device.startswith("cuda") else setting.device,
        weights_only=setting.weights_only,
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in PACKAGES},
        effort=Effort(
            middle - start,
            time.perf_counter() - middle,
            tokens.size,
            sum(lane.bytes_read for lane in lanes),
            len(lanes),
            found is not None,
        ),
    )


def _entry(original: Variant, variant: Variant, corpus: Corpus, tensors: bool) -> _Entry:
    weights = WeightErrors(original, variant) if tensors else None
    lane = Lane(variant, on_weight=weights.observe if weights is not None else None)
    return _Entry(lane, HiddenStates(lane, corpus.context), weights)


def _noise_entry(kind: NoiseKind, original: Variant, corpus: Corpus, setting: Setting) -> _Entry:
    if kind == "dtype":
        lane = Lane(original, dtype="f32" if setting.dtype == "bf16" else "bf16")
    else:
        one_by_one = setting.batch_tokens >= 2 * corpus.context
        lane = Lane(original, batch_tokens=corpus.context if one_by_one else 4 * corpus.context)
    return _Entry(lane, HiddenStates(lane, corpus.context))


def _observe_layers(states: HiddenStates, others: Sequence[_Entry], corpus: Corpus, *, from_cache: bool) -> None:
    """Keep samples of the original's hidden states after every layer, and compare the others' with them.

    The original is the first lane, so that its samples of a layer are there before the others'.
    """
    positions = sample_positions(*corpus.tokens.shape)
    samples = states.samples  # no lane may refer to itself: hidden states go when it is dropped

    def sample(hidden: "torch.Tensor") -> "torch.Tensor":
        return hidden.flatten(0, 1)[positions].cpu()

    def keep(_layer: int, hidden: "torch.Tensor") -> None:
        samples.append(sample(hidden))

    def compare_with(errors: list[LayerError]) -> "Callable[[int, torch.Tensor], None]":
        def observe(layer: int, hidden: "torch.Tensor") -> None:
            if layer < states.lane.variant.description.layer_count:
                errors.append(layer_error(layer, states.sample(layer), sample(hidden)))

        return observe

    if not from_cache:
        states.lane.on_layer = keep
    for entry in others:
        entry.lane.on_layer = compare_with(entry.layers)


def _score(
    states: HiddenStates, others: Sequence[_Entry], corpus: Corpus, setting: Setting, listener: Listener
) -> NDArray[np.float64]:
    """Logits by blocks of rows, for as many models at a time as heads fit into the room of two layers."""
    first, stop = scored_positions(corpus.context)
    step = max(1, ROWS // (stop - first))
    blocks = [(at, min(at + step, len(corpus.tokens))) for at in range(0, len(corpus.tokens), step)]
    head = Head(states.lane, setting)
    groups = _groups(others, head.nbytes, 2 * _layer_bytes(states.lane, setting)) or [[]]
    base_nll: list[NDArray[np.float64]] = []
    listener.started(SCORING, len(groups) * len(blocks))
    for number, group in enumerate(groups):
        release_memory()
        heads = [Head(entry.lane, setting) for entry in group]
        for a, b in blocks:
            targets = np.ascontiguousarray(corpus.tokens[a:b, first + 1 : stop + 1]).reshape(-1)
            rows = prepare_rows(head.logits(states.chunks(a, b)))
            if number == 0:
                base_nll.append(rows.nll(targets))
            for entry, other in zip(group, heads, strict=True):
                entry.scores.append(_scores(rows, other.logits(entry.states.chunks(a, b)), targets))
            listener.advanced(SCORING)
    return np.concatenate(base_nll)


def _scores(rows: LogitRows, logits: "torch.Tensor", targets: NDArray[np.int64]) -> TokenScores:
    return score_rows(rows, prepare_rows(logits), targets)


def _layer_bytes(lane: Lane, setting: Setting) -> int:
    weights = sum(int(np.prod(rule.shape)) for rule in lane.variant.layer_rules(0))
    return weights * int(lane.torch_dtype(setting).itemsize)


def _groups(entries: Sequence[_Entry], head_bytes: int, room: int) -> list[list[_Entry]]:
    """Entries whose heads are in memory together with the original's: as many as fit, one at least.

    Up to 1 GiB counts as fitting: for models whose heads outweigh their layers.
    """
    size = max(1, max(room, 1 << 30) // max(1, head_bytes) - 1)
    return [list(entries[at : at + size]) for at in range(0, len(entries), size)]


# Results


def summarize(variant: Variant) -> ModelSummary:
    """A variant as it lies on disk."""
    types: dict[str, list[int]] = {}
    for tensor in variant.tensors.values():
        share = types.setdefault(tensor.stored_as, [0, 0, 0])
        for at, amount in enumerate((1, tensor.count, tensor.nbytes)):
            share[at] += amount
    return ModelSummary(
        variant.label,
        str(variant.path),
        variant.kind,
        variant.description.hf_architecture,
        variant.description.layer_count,
        variant.parameter_count,
        variant.nbytes,
        variant.bits_per_weight,
        tuple(TypeShare(name, *share) for name, share in sorted(types.items(), key=lambda item: -item[1][1])),
    )


def _chunk_numbers(corpus: Corpus, tokens: int) -> NDArray[np.int64]:
    """int64[tokens]: the chunk of each scored token."""
    return np.repeat(np.arange(len(corpus.tokens)), tokens // len(corpus.tokens))


def _original_result(original: Variant, nll: NDArray[np.float64], corpus: Corpus, setting: Setting) -> OriginalResult:
    chunks = _chunk_numbers(corpus, len(nll))
    by_category = {
        name: likelihood(nll[mask], chunks[mask])
        for name, mask in ((name, np.isin(chunks, numbers)) for name, numbers in corpus.categories.items())
    }
    return OriginalResult(
        summarize(original), setting.dtype, tuple(original.problems), likelihood(nll, chunks), by_category
    )


def _variant_result(
    original: Variant, entry: _Entry, base_nll: NDArray[np.float64], corpus: Corpus, setting: Setting
) -> VariantResult:
    variant = entry.lane.variant
    tensors = entry.weights.finish() if entry.weights is not None else ()
    scores, chunks = TokenScores.join(entry.scores), _chunk_numbers(corpus, len(base_nll))
    by_category = {}
    for name, numbers in corpus.categories.items():
        mask = np.isin(chunks, numbers)
        by_category[name] = divergence(base_nll[mask], scores.select(mask), chunks[mask])
    problems = [*variant.problems, *differences(original, variant), *doubtful_tensors(tensors)]
    return VariantResult(
        model=summarize(variant),
        dtype=setting.dtype,
        activations=variant.activations(),
        activations_emulated=variant.activations() is not None and entry.lane.quantizes_inputs(setting),
        problems=tuple(problems),
        overall=divergence(base_nll, scores, chunks),
        by_category=by_category,
        chunk_kld=tuple(map(float, scores.kld.reshape(len(corpus.tokens), -1).mean(1))),
        layers=tuple(entry.layers),
        tensors=tensors,
    )


def _noise_floor(
    kind: NoiseKind, entry: _Entry, base_nll: NDArray[np.float64], corpus: Corpus, setting: Setting
) -> NoiseFloor:
    if kind == "dtype":
        what = f"the original in {entry.lane.dtype} against {setting.dtype}"
    else:
        chunks = entry.lane.batch(setting, corpus.context)
        what = f"the original {chunks} chunks at a time against {max(1, setting.batch_tokens // corpus.context)}"
    overall = divergence(base_nll, TokenScores.join(entry.scores), _chunk_numbers(corpus, len(base_nll)))
    return NoiseFloor(kind, what, overall, tuple(entry.layers))


# Differences that the configuration shows


def check_comparable(original: Variant, variant: Variant) -> None:
    """Raise VariantError if the two do not predict the same tokens."""
    sizes = original.description.vocab_size, variant.description.vocab_size
    with errors_of(variant):
        if sizes[0] != sizes[1]:
            raise StreamquantError(
                "a variant with another vocabulary",
                where=str(variant.path),
                found=f"{sizes[1]} tokens",
                required=f"{sizes[0]} tokens, as in {original.path}",
                hint="is it a variant of this model?",
            )


def differences(original: Variant, variant: Variant) -> list[Problem]:
    """Problems where the hyperparameters or rotary frequencies of a variant are not the original's."""
    problems = []
    expected, found = original.description, variant.description
    for name, size in expected.hyperparameters.items():
        other = found.hyperparameters.get(name)
        if other != size:
            problems.append(
                Problem("hyperparameters", "error", f"another number of {name}", None, str(other), str(size))
            )
    a, b = expected.norm_epsilon, found.norm_epsilon
    if abs(a - b) > 1e-4 * a:
        problems.append(Problem("hyperparameters", "error", "another rms_norm_eps", None, f"{b:g}", f"{a:g}"))
    problems += _rope_differences(original, variant)
    window = expected.sliding_window
    if window is not None and found.sliding_window != window:
        problems.append(
            Problem(
                "window",
                "note",
                "attends to the whole context, the original to a window: longer texts differ",
                found="no window",
                required=f"sliding_window {window}",
            )
        )
    return problems


def _rope_differences(original: Variant, variant: Variant) -> list[Problem]:
    (a, a_factor), (b, b_factor) = inverse_frequencies(original), inverse_frequencies(variant)
    if not len(a) and not len(b):
        return []
    if a.shape != b.shape:
        return [Problem("rope", "error", "heads of another width", None, str(2 * len(b)), str(2 * len(a)))]
    problems = []
    ratio = (b.double() / a.double()).numpy()
    worst = int(np.argmax(np.abs(np.log(ratio))))
    if abs(ratio[worst] - 1) > 1e-3:
        problems.append(
            Problem(
                "rope",
                "error",
                "rotary frequencies are not the original's (rope_freqs.weight left out, or another theta or scaling): "
                "long texts suffer most",
                where=f"frequency {worst} of {len(ratio)}",
                found=f"{ratio[worst]:.4g} times the original's",
                required="the same",
            )
        )
    if abs(a_factor - b_factor) > 1e-4:
        problems.append(
            Problem("rope", "error", "another factor of cos and sin", None, f"{b_factor:.5g}", f"{a_factor:.5g}")
        )
    return problems
