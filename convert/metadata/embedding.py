"""What sentence-transformers says of an embedding model, as GGUF keys: how hidden states become one vector.

Source: _try_set_pooling_type of llama.cpp's converter (conversion/base.py), which the classes of qwen2 and qwen3 call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys, PoolingType
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures import ModelDescription
from streamquant.convert.metadata.vocabulary_files import read_json, require
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
