"""Embedding models and rerankers: the keys that tell llama.cpp how hidden states become one vector, or a score.

Source: _try_set_pooling_type of llama.cpp's converter (conversion/base.py), which the classes of qwen2 and qwen3 call,
and Qwen3Model (conversion/qwen.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import MODEL_ARCH, GGUFValueType, Keys, PoolingType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures import ModelDescription
from streamquant.convert.metadata.vocabulary_files import read_json, require
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.side_files import SIDE_FOLDERS
from streamquant.files.strict_json import read_json as read_any_json
from streamquant.quant.errors import StreamquantError

MODULES = "modules.json"
# sentence-transformers' names: those of its older files, and of "pooling_mode" in the newer ones.
_MODES = {
    "pooling_mode_mean_tokens": ("mean", PoolingType.MEAN),
    "pooling_mode_cls_token": ("cls", PoolingType.CLS),
    "pooling_mode_lasttoken": ("lasttoken", PoolingType.LAST),
}
_OTHERS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
# Modules that llama.cpp does itself, or that this reads.
_KNOWN = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class Module:
    """A step of sentence-transformers: its class, and its folder below the checkpoint's."""

    kind: str
    path: str


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Read modules.json of a checkpoint; () if there is none.

    Raises StreamquantError if it is malformed or names a folder that is not the checkpoint's own.
    """
    path = folder / MODULES
    if not path.is_file():
        return ()
    entries = read_any_json(path)
    require(entries, list, str(path))
    found = []
    for number, entry in enumerate(entries):
        where = f"{path}[{number}]"
        require(entry, dict, where)
        for key in ("type", "path"):
            require(entry.get(key), str, f"{where}.{key}")
        if entry["path"] and not SIDE_FOLDERS.fullmatch(entry["path"]):
            raise StreamquantError(
                "a module's folder is not one of the checkpoint's",
                where=f"{where}.path",
                found=repr(entry["path"])[:200],
                required="a name such as '1_Pooling'",
            )
        found.append(Module(entry["type"].rpartition(".")[2], entry["path"]))
    return tuple(found)


def pooling_keys(folder: Path, model: ModelDescription) -> tuple[dict[str, GGUFValue], tuple[str, ...]]:
    """Return {arch}.pooling_type, if the checkpoint is an embedding model and llama.cpp reads the key, and notes.

    Raises StreamquantError if modules.json or the pooling's config.json is malformed, or llama.cpp has no such pooling.
    """
    modules = read_modules(folder)
    pooling = next((module for module in modules if module.kind.endswith("Pooling")), None)
    notes = [*_notes_on_others(modules)]
    if pooling is None:
        return {}, tuple(notes)
    place = folder / pooling.path / "config.json"
    if not place.is_file():
        raise StreamquantError(
            "cannot read how the model pools",
            where=str(place),
            found=f"no such file, and {MODULES} names it",
            hint=f"fetch it from the model's repository, or remove {MODULES} if it is no embedding model",
        )
    kind = _pooling(read_json(place), place)
    if not model.family.llama_cpp.pooling:
        notes.append(
            f"WARNING: an embedding model ({MODULES}) of arch {model.gguf_arch!r}, for which llama.cpp reads no"
            f" pooling_type: run it with --pooling {kind.name.lower()}"
        )
        return {}, tuple(notes)
    key = Keys.LLM.POOLING_TYPE.format(arch=model.gguf_arch)
    notes.append(f"{key} = {kind.value} ({kind.name}): an embedding model, by {pooling.path}/config.json")
    return {key: GGUFValue(kind.value, GGUFValueType.UINT32)}, tuple(notes)


def embedding_keys(checkpoint: Checkpoint, model: ModelDescription) -> tuple[dict[str, GGUFValue], tuple[str, ...]]:
    """The keys of an embedding model or a reranker in its GGUF, in the converter's order, and notes; {} of any other.

    Raises StreamquantError as `pooling_keys` does.
    """
    keys, notes = pooling_keys(checkpoint.folder, model)
    if is_reranker(checkpoint.folder, checkpoint.name, checkpoint.config, model):
        keys |= reranker_keys(model.gguf_arch)
        notes = (*notes, f"a reranker, by its name or card: {CLASSIFIER}, labels yes and no, template 'rerank'")
    return keys, notes


def _pooling(config: Mapping[str, Any], place: Path) -> PoolingType:
    for key in (*_MODES, *_OTHERS):
        require(config.get(key), (bool, type(None)), f"{place}, {key}")
    chosen = [key for key in (*_MODES, *_OTHERS) if config.get(key)]
    mode = config.get("pooling_mode")
    if not chosen and isinstance(mode, str):
        chosen = [key for key, (name, _) in _MODES.items() if name == mode] or [mode]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise StreamquantError(
            "a pooling that llama.cpp has not",
            where=str(place),
            found=", ".join(chosen) or repr(mode)[:100],
            required=f"one of {', '.join(_MODES)}",
            hint="leave the GGUF variants out",
        )
    return _MODES[chosen[0]][1]


def _notes_on_others(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if not module.kind.endswith(_KNOWN):
            yield f"WARNING: {MODULES} has a step {module.kind} ({module.path}) that GGUF does not hold"


# --- rerankers --------------------------------------------------------------------------------------------------------

CLASSIFIER = "cls.output.weight"
"""Two rows, one for each answer: llama.cpp scores a document by them (pooling type RANK)."""
ANSWERS = ("yes", "no")
_HINTS = ("qwen3-reranker", "qwen3-vl-reranker")
_RERANK = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided."
    ' Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def is_reranker(folder: Path, name: str, config: Mapping[str, Any], model: ModelDescription) -> bool:
    """Whether llama.cpp's converter takes a checkpoint for Qwen3-Reranker: by its card or its name.

    (_is_qwen3_reranker of conversion/qwen.py. `name` is the model's.)
    """
    if model.family.llama_cpp.arch != MODEL_ARCH.QWEN3:
        return False
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace").lower() if card.is_file() else ""
    names = (name, str(config.get("_name_or_path") or ""))
    return any(f"# {hint}" in text or any(hint in part.lower() for part in names) for hint in _HINTS)


def reranker_keys(arch: str) -> dict[str, GGUFValue]:
    """The keys of a reranker, in the converter's order."""
    texts = GGUFValueType.ARRAY, GGUFValueType.STRING
    return {
        Keys.LLM.POOLING_TYPE.format(arch=arch): GGUFValue(PoolingType.RANK.value, GGUFValueType.UINT32),
        Keys.Classifier.OUTPUT_LABELS.format(arch=arch): GGUFValue([*ANSWERS], *texts),
        Keys.Tokenizer.CHAT_TEMPLATE_N.format(name="rerank"): GGUFValue(_RERANK, GGUFValueType.STRING),
        Keys.Tokenizer.CHAT_TEMPLATES: GGUFValue(["rerank"], *texts),
    }


def answer_ids(folder: Path) -> tuple[int, ...]:
    """The ids of ANSWERS in tokenizer.json. Raises StreamquantError if one is no token."""
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found = [vocab.get(text) if isinstance(vocab, dict) else None for text in ANSWERS]
    ids = tuple(number for number in found if type(number) is int)
    if len(ids) != len(ANSWERS):
        raise StreamquantError(
            "a reranker whose answers are no tokens",
            where=str(folder / "tokenizer.json"),
            found=", ".join(f"{text!r}: {number}" for text, number in zip(ANSWERS, found, strict=True)),
            required="a token each",
            hint="its name or card say Qwen3-Reranker; rename the model if it is none",
        )
    return ids
