"""Which files of a folder or repository hold the weights, and what it is if none do: an adapter, Mistral's own layout.

transformers takes the file that config.json names as transformers_weights, then model.safetensors, then the index
(_get_resolved_checkpoint_files of modeling_utils.py, 5.17); llama.cpp's converter takes what the index names, and
model*.safetensors without one (index_tensors of conversion/base.py).
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamquant.quant.errors import StreamquantError

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS_KEY = "transformers_weights"
"""Of config.json: the file of the weights, or their index. transformers leaves the key out of a config that it saves.
No other key of config.json decides which files transformers 5.17 loads."""
_SHARD, _INDEX = ".safetensors", ".safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>[\w.-]+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors", re.ASCII)
_MISTRAL = re.compile(r"consolidated[\w.-]*\.safetensors|params\.json")
_LORA = re.compile(r"\.(?:lora_[A-Za-z_]+|base_layer|modules_to_save)\.")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or a repository as a list of files."""

    where: str
    """As messages name it."""
    names: Collection[str]
    """Of the files at the top."""
    read: Callable[[str], dict[str, Any]]
    """The JSON object in a file at the top. Raises StreamquantError."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of the weights, in their order; tensor name -> file where there is an index; notes for the user."""

    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    passed_over: bool = False
    """Whether there is an index that nobody asked, because model.safetensors goes before it."""
    index: str = INDEX
    """Where `weight_map` is from, if there is one."""


def find_weights(place: Place) -> Weights:
    """Choose the files of the weights. Raises StreamquantError where there is no model, and for a broken index."""
    named = place.read(CONFIG).get(WEIGHTS_KEY) if CONFIG in place.names else None
    if named is not None:
        weights = _named_by_config(place, named)
    elif SINGLE_FILE in place.names:
        weights = Weights((SINGLE_FILE,), passed_over=INDEX in place.names)
    elif INDEX in place.names:
        weights = _indexed(place, INDEX)
    else:
        weights = _numbered(place)
    if CONFIG not in place.names:
        raise StreamquantError(
            "not a Hugging Face checkpoint", where=place.where, found="no config.json", required="config.json"
        )
    return weights


def read_weight_map(place: Place, index: str = INDEX) -> dict[str, str]:
    """Tensor name -> file name, by the index, which is there. Raises StreamquantError if it names a file elsewhere."""
    return _weight_map(place, index, place.read(index))


def _indexed(place: Place, index: str) -> Weights:
    """The weights that an index names, with a note where transformers does not load it. Raises StreamquantError."""
    record = place.read(index)
    weight_map = _weight_map(place, index, record)
    notes: tuple[str, ...] = (
        f'WARNING: {index} has no "metadata": the model is converted, but transformers does not load it; '
        '"metadata": {} is enough for it',
    )
    if isinstance(record.get("metadata"), dict):
        notes = ()
    return Weights(tuple(sorted(set(weight_map.values()))), weight_map, notes, index=index)


def _weight_map(place: Place, index: str, record: Mapping[str, Any]) -> dict[str, str]:
    weight_map = record.get("weight_map")
    where = f"{place.where}/{index}, weight_map"
    if not isinstance(weight_map, dict) or not weight_map:
        raise StreamquantError("broken index", where=where, required="an object: tensor name -> file name")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file or file in ("", ".", ".."):
            raise StreamquantError(
                "index names a file outside the checkpoint's folder",
                where=f"{where}, tensor {tensor!r}",
                found=repr(file),
                required="a plain file name",
            )
        if not file.endswith(".safetensors"):
            raise StreamquantError(
                "index names a file that is not safetensors", where=f"{where}, tensor {tensor!r}", found=file
            )
    return weight_map


def refuse_adapters(names: Iterable[str], where: str) -> None:
    """Raise StreamquantError if a tensor is part of a LoRA adapter, or of a model that one is still wrapped around."""
    for name in names:
        if _LORA.search(name):
            raise StreamquantError(
                "the weights of a LoRA adapter are not merged into the model",
                where=f"{where}, tensor {name!r}",
                required="a merged model",
                hint="in Python with peft: merged = model.merge_and_unload(); merged.save_pretrained('MERGED')",
            )


def _named_by_config(place: Place, named: object) -> Weights:
    """The weights that config.json names. Raises StreamquantError if it names no safetensors file at the top."""
    where = f"{place.where}/{CONFIG}, {WEIGHTS_KEY}"
    if not isinstance(named, str) or not named.endswith((_SHARD, _INDEX)) or Path(named).name != named:
        raise StreamquantError(
            "config.json names weights that cannot be read",
            where=where,
            found=f"{named!r:.200}",
            required=f"the name of a {_SHARD} or {_INDEX} file in the same folder",
            hint=f"remove the key if {SINGLE_FILE} or {INDEX} is the model; transformers loads what the key names",
        )
    if named not in place.names:
        raise StreamquantError(
            "config.json names weights that are not there",
            where=where,
            found=f"no {named!r:.200}",
            required="a file in the same folder",
            hint=f"download it, or remove the key if {SINGLE_FILE} or {INDEX} is the model",
        )
    others = [name for name in (SINGLE_FILE, INDEX) if name in place.names and name != named]
    warning = f"; WARNING: llama.cpp's converter would take {others[0]}, which is there too" if others else ""
    notes = (f"config.json names {named} as the weights: it is converted, as transformers loads it{warning}",)
    if not named.endswith(_INDEX):
        return Weights((named,), notes=notes if named != SINGLE_FILE else ())
    weights = _indexed(place, named)
    return replace(weights, notes=(*(notes if named != INDEX else ()), *weights.notes))


def _numbered(place: Place) -> Weights:
    """A whole set of numbered shards without an index. Raises StreamquantError if there is none."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in place.names:
        found = _NUMBERED.fullmatch(name)
        if found and not _MISTRAL.fullmatch(name) and not name.startswith("adapter_"):
            sets.setdefault((found["stem"], int(found["count"])), set()).add(int(found["number"]))
    if len(sets) != 1:
        raise _no_weights(place)
    (((stem, count), numbers),) = sets.items()
    shards = tuple(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    if missing := [shard for shard in shards if shard not in place.names]:
        raise StreamquantError(
            "shards without an index, and not all of them",
            where=place.where,
            found=f"{len(numbers)} of {count}; {missing[0]} is missing",
            required=f"all {count}, or {INDEX}",
            hint="download the missing files",
        )
    note = (
        f"there is no {INDEX}: the names say that the {count} shards are all of them, as llama.cpp's converter has it"
    )
    return Weights(shards, None, (note,))


def _no_weights(place: Place) -> StreamquantError:
    """What to say of a place without a model's weights."""
    if ADAPTER in place.names:
        return _is_adapter(place)
    shards = sorted(name for name in place.names if name.endswith(".safetensors"))
    if any(_MISTRAL.fullmatch(name) for name in place.names) and all(_MISTRAL.fullmatch(name) for name in shards):
        return StreamquantError(
            "a checkpoint in Mistral's own layout",
            where=place.where,
            found=", ".join(sorted(name for name in place.names if _MISTRAL.fullmatch(name))[:3]),
            required=f"Hugging Face's layout: {CONFIG}, and {SINGLE_FILE} or {INDEX}",
            hint="fetch the files in that layout, which most of Mistral's repositories have too; else convert it with "
            "transformers: convert_mistral_weights_to_hf.py",
        )
    if CONFIG not in place.names and not shards:
        return StreamquantError(
            "not a Hugging Face checkpoint", where=place.where, found="no config.json", required="config.json"
        )
    pickles = sorted(name for name in place.names if name.endswith((".bin", ".pth", ".pt")))
    others = sorted(name for name in place.names if name.endswith(".gguf"))
    found, hint = "no safetensors", "download the model's weights"
    if shards:
        found = f"{', '.join(shards[:3])} without an index"
        hint = f"download {INDEX}" if len(shards) > 1 else f"if it is the whole model, call it {SINGLE_FILE}"
    elif pickles:
        found = f"{', '.join(pickles[:3])}: pickle files run code when they are loaded and are never read"
        hint = "convert them to safetensors first"
    elif others:
        found, hint = ", ".join(others[:3]), "streamquant starts from the unquantized checkpoint, in safetensors"
    return StreamquantError(
        "no weights to convert", where=place.where, found=found, required=f"{SINGLE_FILE} or {INDEX}", hint=hint
    )


def _is_adapter(place: Place) -> StreamquantError:
    settings = place.read(ADAPTER)
    kind, base = (settings.get(key) for key in ("peft_type", "base_model_name_or_path"))
    load = "AutoPeftModelForCausalLM.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')"
    return StreamquantError(
        "an adapter, not a model",
        where=place.where,
        found=f"{ADAPTER}: {kind if isinstance(kind, str) else 'an adapter'} of {base!r:.200}",
        required="the merged model",
        hint=f'merge it first: python -c "from peft import AutoPeftModelForCausalLM; {load}", copy the tokenizer files '
        "into MERGED, and convert MERGED",
    )
