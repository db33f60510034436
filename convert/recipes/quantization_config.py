"""config.json's quantization_config, made by compressed-tensors' own QuantizationConfig, never by hand.

compressed-tensors imports torch and transformers: seconds and hundreds of megabytes. So it runs in a process of its
own beside the conversion, and its answer is kept in the user's cache folder, by its version. `python -m
streamquant.convert.recipes.quantization_config FP8_DYNAMIC` prints it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamquant.files.folders import cache_folder, folder_of_children
from streamquant.files.strict_json import read_json_object
from streamquant.files.writing import write_atomically
from streamquant.quant.errors import StreamquantError

IGNORE = ("lm_head", "model.embed_tokens")
"""Modules that stay unquantized. llm-compressor's documented example leaves the embeddings out of this list, and FP8
embeddings load without an error and are wrong (transformers) or not at all (vLLM)."""

GROUPS = "-g"
"""Between a preset and the size of its groups, where that is not the preset's."""

KV = "+kv"
"""Behind a preset, where a key-value cache in FP8 is described."""
ONESHOT = ("FP8", "NVFP4")
"""Presets that llm-compressor calibrates."""

CACHE_VERSION = 4
"""Raise it when `quantization_config` changes."""


class QuantizationConfigs:
    """The quantization_config of some schemes: from the cache, or computed in the background."""

    def __init__(self, schemes: Iterable[str]) -> None:
        self._configs = {scheme: _read_cache(scheme) for scheme in sorted(set(schemes))}
        self._missing = [scheme for scheme, config in self._configs.items() if config is None]
        self._process: subprocess.Popen[str] | None = None
        if self._missing:
            # -P: a folder named `convert` in the user's working directory is not ours
            command = [sys.executable, "-P", "-m", __name__, *self._missing]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder_of_children(),
            )

    def __getitem__(self, scheme: str) -> dict[str, Any]:
        """The quantization_config of `scheme`; waits for it. Raises StreamquantError if compressed-tensors fails."""
        config = self._configs[scheme]
        if config is None:
            self._wait()
            config = self._configs[scheme]
            assert config is not None, "the process answers for every scheme that it was given"
        return config

    def close(self) -> None:
        """Stop the background process if it is still running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def _wait(self) -> None:
        assert self._process is not None, "a scheme is missing, so the process was started"
        out, err = self._process.communicate()
        if self._process.returncode != 0:
            raise StreamquantError(
                "compressed-tensors could not describe the scheme",
                where=", ".join(self._missing),
                found=err.strip().rpartition("\n")[2] or f"exit code {self._process.returncode}",
                hint="reinstall compressed-tensors, torch and transformers in the versions of constraints.txt",
            )
        for scheme, config in json.loads(out).items():
            self._configs[scheme] = config
            _write_cache(scheme, config)


def _cache_path(scheme: str) -> Path:
    version = importlib.metadata.version("compressed-tensors")
    return cache_folder() / f"quantization_config-{CACHE_VERSION}-{version}-{scheme}.json"


def _read_cache(scheme: str) -> dict[str, Any] | None:
    """What the installed version of compressed-tensors said before; None if it was not asked or the file is damaged."""
    path = _cache_path(scheme)
    try:
        found = read_json_object(path) if path.is_file() else {}
    except StreamquantError:
        return None
    match found:
        case {"config": dict(config), "sha256": str(sha256)} if sha256 == _hash(config):
            return config
    return None


def _write_cache(scheme: str, config: dict[str, Any]) -> None:
    """Keep it for the next run; a cache folder that cannot be written is no fault."""
    path = _cache_path(scheme)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"config": config, "sha256": _hash(config)}).encode(), shared=True)


def _hash(config: dict[str, Any]) -> str:
    """It goes into config.json as it is, so that a damaged one must not pass for it."""
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()


def with_ignored(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """A quantization_config with more modules to leave alone, in compressed-tensors' spelling; as if made with them."""
    return {**config, "ignore": [*config["ignore"], *modules]} if modules else {**config}


def quantization_config(scheme: str) -> dict[str, Any]:
    """The quantization_config that llm-compressor's model_free_ptq writes for a preset scheme with IGNORE.

    "W4A16-g32" is the preset W4A16 with groups of 32. For a preset of ONESHOT, and for "FP8_DYNAMIC+kv", it is what its
    oneshot writes. Imports compressed-tensors, and so torch.
    (compressed_tensors/quantization/quant_config.py; ModelFreePtqConverter.update_config and validate_config of
    llm-compressor, which calls a scheme that is no preset "config_group_0")
    """
    import torch
    from compressed_tensors import __version__
    from compressed_tensors.base import COMPRESSION_VERSION_NAME, TRANSFORM_CONFIG_NAME
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    if scheme in ONESHOT or scheme.endswith(KV):
        return _of_oneshot(*scheme.partition(KV)[:2])
    name, _, group = scheme.partition(GROUPS)
    preset = preset_name_to_scheme(name, ["Linear"])
    if group:
        preset.weights.group_size = int(group)
    format_name = infer_module_format(torch.nn.Linear, preset).value
    preset.format = format_name
    config = QuantizationConfig(
        config_groups={"config_group_0" if group else name: preset},
        ignore=list(IGNORE),
        quantization_status=QuantizationStatus.COMPRESSED,
        format=format_name,
    )
    return {COMPRESSION_VERSION_NAME: __version__, TRANSFORM_CONFIG_NAME: {}, **config.model_dump(mode="json")}


def _of_oneshot(name: str, with_cache: str) -> dict[str, Any]:
    """What llm-compressor's oneshot writes of a QuantizationModifier for "Linear", the head left out: with the names of
    its observers. (resolve_quantization_config and _apply_default_observers of its modifiers/quantization)"""
    import torch
    from compressed_tensors import __version__
    from compressed_tensors.base import COMPRESSION_VERSION_NAME, SPARSITY_CONFIG_NAME, TRANSFORM_CONFIG_NAME
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    preset = preset_name_to_scheme(name, ["Linear"])
    format_name = infer_module_format(torch.nn.Linear, preset).value
    preset.format = format_name
    preset.weights.observer = "memoryless_minmax"
    if preset.input_activations.dynamic is not True:
        preset.input_activations.observer = "static_minmax"
    cache = QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=False, observer="static_minmax")
    config = QuantizationConfig(
        config_groups={"group_0": preset},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.COMPRESSED,
        format=format_name,
        kv_cache_scheme=cache if with_cache else None,
    )
    described = config.model_dump(mode="json")
    return {COMPRESSION_VERSION_NAME: __version__, TRANSFORM_CONFIG_NAME: {}, SPARSITY_CONFIG_NAME: {}, **described}


if __name__ == "__main__":
    json.dump({scheme: quantization_config(scheme) for scheme in sys.argv[1:]}, sys.stdout)
