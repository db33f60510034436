"""The general.* metadata of a GGUF file: what the model is called, whose it is, what it came from, how to sample."""

import datetime
import json
import pathlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import gguf
import yaml

from streamquant.convert.architectures.config_values import LARGEST_FLOAT32, shorten
from streamquant.files.folders import real_path
from streamquant.files.strict_json import read_json_object
from streamquant.quant.errors import StreamquantError, UsageError

GGUFValue: TypeAlias = gguf.gguf_writer.GGUFValue
GGUFType = gguf.GGUFValueType

# Sampling settings of generation_config.json that the library gguf takes over, and their types (gguf.Metadata.load).
_SAMPLING = {
    "sequence": str,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "xtc_probability": float,
    "xtc_threshold": float,
    "temperature": float,
    "penalty_last_n": int,
    "penalty_repeat": float,
    "mirostat": int,
    "mirostat_tau": float,
    "mirostat_eta": float,
}
# What --metadata may set: GGUF key -> attribute of gguf.Metadata (the keys of gguf.Metadata.load, and general.license).
_ATTRIBUTES = {
    **{f"general.sampling.{name}": f"sampling_{name}" for name in _SAMPLING if name != "temperature"},
    "general.sampling.temp": "sampling_temp",
    **{
        f"general.{name.replace('source_', 'source.').replace('license_', 'license.')}": name
        for name in (
            *("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by"),
            *("size_label", "license", "license_name", "license_link", "url", "doi", "uuid", "repo_url"),
            *("source_url", "source_doi", "source_uuid", "source_repo_url", "base_models", "datasets", "tags"),
            "languages",
        )
    },
}
_OTHERS = frozenset({"general.architecture", "general.file_type", "general.quantization_version"})
_INT32 = range(-(2**31), 2**31)
_MAX_CARD = 4 * 1024 * 1024  # bytes; model cards of 100 kB are long
_HINT = "set the right value with --metadata, or correct the file"


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Weights of a GGUF, as its general.size_label counts them (GGUFWriter.get_total_parameter_count of gguf-py)."""

    total: int
    shared: int
    """Those outside of experts."""
    expert: int = 0
    """Those of one expert of every layer."""
    experts: int = 0
    """Experts of a layer; 0 in dense models."""

    @property
    def size_label(self) -> str:
        """
        >>> ParameterCounts(8_030_000_000, 8_030_000_000).size_label
        '8.0B'
        >>> ParameterCounts(30_532_122_624, 1_541_093_376, 226_492_416, 128).size_label
        '128x1.8B'
        """
        return str(gguf.size_label(self.total, self.shared, self.expert, self.experts))


def read_model_metadata(
    folder: pathlib.Path,
    *,
    counts: ParameterCounts,
    overrides: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> dict[str, GGUFValue]:
    """Return the general.* keys of a model, as llama.cpp's converter writes them.

    folder           the checkpoint: README.md (front matter), config.json, generation_config.json, and its own name
    counts           weights of the model, for general.size_label where the name holds no size
    overrides        GGUF key -> value, instead of what was found (--metadata)
    name             the name of the model, where it is not that of the folder

    general.architecture, .file_type and .quantization_version are left to the caller. The rules are those of the PyPI
    package gguf (gguf.Metadata) and of the converter's prepare_metadata.

    Raises StreamquantError if a file is malformed or a value has the wrong type, UsageError on a wrong override.
    """
    # '.' has no name of its own; a link keeps its name, as it was given.
    path = real_path(folder) if folder.name in ("", "..") else folder.absolute()
    _check_files(path)
    try:
        metadata = _load(path, name or path.name, counts.total)
    except Exception as fault:  # what the library cannot read although each file was checked
        raise StreamquantError(
            "cannot read the model card metadata",
            where=f"{path}: README.md, config.json or the folder's name",
            found=f"{type(fault).__name__}: {fault}",
            hint="correct the front matter of README.md",
        ) from fault
    _override(metadata, overrides or {})
    if metadata.name is None:
        metadata.name = name or path.name
    if metadata.size_label is None and counts.total > 0:
        metadata.size_label = counts.size_label
    return _collect(metadata, path)


def _load(path: pathlib.Path, name: str, parameter_count: int) -> Any:
    """What the library gguf finds, which reads a model's name off its folder's: a link to it has the right one."""
    if name == path.name:
        return gguf.Metadata.load(None, path, None, parameter_count)
    with tempfile.TemporaryDirectory() as folder:
        link = pathlib.Path(folder, name)
        link.symlink_to(path)
        return gguf.Metadata.load(None, link, None, parameter_count)


def _collect(metadata: Any, path: pathlib.Path) -> dict[str, GGUFValue]:
    writer = gguf.GGUFWriter(path=None, arch="")
    writer.add_type(gguf.GGUFType.MODEL)
    try:
        metadata.set_gguf_meta_model(writer)
    except (TypeError, AttributeError, KeyError, ValueError) as fault:
        raise StreamquantError(
            "model card metadata of the wrong shape",
            where=str(path / "README.md"),
            found=f"{type(fault).__name__}: {fault}",
            hint=_HINT,
        ) from fault
    found = {key: value for key, value in writer.kv_data[0].items() if key not in _OTHERS}
    return {key: _checked(key, value, path) for key, value in found.items()}


def _check_files(path: pathlib.Path) -> None:
    _check_card(path / "README.md")
    config = _read(path / "config.json")
    origin = config.get("_name_or_path")
    if origin is not None and not isinstance(origin, str):
        raise StreamquantError(
            "wrong type",
            where=f"{path / 'config.json'}, _name_or_path",
            found=repr(origin),
            required="a string or null",
        )
    generation = _read(path / "generation_config.json")
    for key, kind in _SAMPLING.items():
        _check_sampling(generation.get(key), kind, f"{path / 'generation_config.json'}, {key}", StreamquantError)


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _check_card(path: pathlib.Path) -> None:
    """Parse the front matter as the library will, which lets every fault of YAML through."""
    if not path.is_file():
        return
    if path.stat().st_size > _MAX_CARD:
        raise StreamquantError(
            "model card too large", where=str(path), found=f"{path.stat().st_size:,} bytes", required=f"{_MAX_CARD:,}"
        )
    try:
        _refuse_aliases(path.read_text(encoding="utf-8"))
        gguf.Metadata.load_model_card(path.parent)
    except Exception as fault:
        raise StreamquantError(
            "broken model card",
            where=f"{path}, front matter between the lines ---",
            found=" ".join(str(fault).split())[:300],
            required="YAML in UTF-8",
            hint="correct or remove the front matter",
        ) from fault


def _refuse_aliases(card: str) -> None:
    """Raise ValueError for YAML aliases: no model card needs them, and nested they grow without bound."""
    lines = card.splitlines()
    if not lines or lines[0] != "---":
        return
    front = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else lines[1:]
    for token in yaml.scan("\n".join(front).replace("\t", "  ")):
        if isinstance(token, yaml.AliasToken):
            raise ValueError(f"an alias, *{token.value}, in line {token.start_mark.line + 2}")


def _check_sampling(value: object, kind: type, where: str, error: type[StreamquantError]) -> None:
    if value is None:
        return
    fits = {
        str: isinstance(value, str),
        int: type(value) is int and value in _INT32,
        # In this form NaN fails, and an integer too large for a float is compared too.
        float: type(value) in (int, float) and -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32,  # type: ignore[operator]
    }
    if not fits[kind]:
        needed = {str: "a string", int: "an integer of 32 bits", float: "a finite number that float32 can hold"}[kind]
        is_long = isinstance(value, int) and value.bit_length() > 256
        found = shorten(value) if is_long else json.dumps(value, default=str)
        raise error("wrong sampling setting", where=where, found=found, required=needed)


def _override(metadata: Any, overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        attribute = _ATTRIBUTES.get(key)
        if attribute is None:
            raise UsageError(
                "unknown metadata key",
                where="--metadata",
                found=repr(key),
                required="one of " + ", ".join(sorted(_ATTRIBUTES)),
            )
        _check_override(key, attribute, value)
        setattr(metadata, attribute, value)


def _check_override(key: str, attribute: str, value: object) -> None:
    where = f"--metadata, {key}"
    if attribute.startswith("sampling_"):
        setting = attribute.removeprefix("sampling_").replace("temp", "temperature")
        _check_sampling(value, _SAMPLING[setting], where, UsageError)
        return
    lists = {"tags": str, "languages": str, "base_models": dict, "datasets": dict}
    if attribute in lists:
        kind = lists[attribute]
        fits = isinstance(value, list) and all(isinstance(item, kind) for item in value)
        required = f"a list of {'strings' if kind is str else 'objects of strings'}"
        if fits and kind is dict and isinstance(value, list):
            fits = all(isinstance(text, str) for item in value for text in item.values())
    else:
        fits, required = isinstance(value, str), "a string"
    if value is not None and not fits:
        raise UsageError("wrong metadata value", where=where, found=repr(value)[:100], required=required)


def _checked(key: str, value: GGUFValue, path: pathlib.Path) -> GGUFValue:
    """Return a value that can be written; YAML's numbers and dates where text belongs become text (version: 1.0)."""
    if value.type == GGUFType.STRING:
        return GGUFValue(_text(key, value.value, path), value.type, value.sub_type)
    if value.type == GGUFType.ARRAY:
        return GGUFValue([_text(key, item, path) for item in value.value], value.type, value.sub_type)
    return value


def _text(key: str, value: object, path: pathlib.Path) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, int | float | datetime.date):
        text = str(value)
    else:
        raise StreamquantError(
            "metadata value is no text", where=f"{path / 'README.md'}, for {key}", found=repr(value)[:100], hint=_HINT
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise StreamquantError(
            "metadata value is not valid Unicode",
            where=f"{path / 'README.md'}, for {key}",
            found=ascii(text)[:100],
            hint=_HINT,
        ) from fault
    return text
