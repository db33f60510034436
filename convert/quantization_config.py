"""config.json's quantization_config, made by compressed-tensors' own QuantizationConfig, never by hand.

compressed-tensors imports torch and transformers: seconds and hundreds of megabytes. So it runs in a process of its
own, beside the conversion: `python -m convert.quantization_config FP8_DYNAMIC FP8_BLOCK` prints one JSON object.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from quant.errors import StreamquantError

IGNORE = ("lm_head", "model.embed_tokens")
"""Modules that stay unquantized. llm-compressor's documented example leaves the embeddings out of this list, and FP8
embeddings load without an error and are wrong (transformers) or not at all (vLLM)."""


class QuantizationConfigs:
    """The quantization_config of some schemes, computed in the background."""

    def __init__(self, schemes: Iterable[str]) -> None:
        self._schemes = sorted(set(schemes))
        self._process: subprocess.Popen[str] | None = None
        self._configs: dict[str, dict[str, Any]] | None = None
        if self._schemes:
            # -P: a folder named `convert` in the user's working directory is not ours
            command = [sys.executable, "-P", "-m", __name__, *self._schemes]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def __getitem__(self, scheme: str) -> dict[str, Any]:
        """The quantization_config of `scheme`; waits for it. Raises StreamquantError if compressed-tensors fails."""
        if self._configs is None:
            assert self._process is not None, "no scheme was asked for"
            out, err = self._process.communicate()
            if self._process.returncode != 0:
                raise StreamquantError(
                    "compressed-tensors could not describe the scheme",
                    where=", ".join(self._schemes),
                    found=err.strip().rpartition("\n")[2] or f"exit code {self._process.returncode}",
                    hint="reinstall compressed-tensors, torch and transformers in the versions of constraints.txt",
                )
            self._configs = json.loads(out)
        return self._configs[scheme]

    def close(self) -> None:
        """Stop the background process if it is still running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def quantization_config(scheme: str) -> dict[str, Any]:
    """The quantization_config that llm-compressor's model_free_ptq writes for a preset scheme with IGNORE.

    Imports compressed-tensors, and so torch. (compressed_tensors/quantization/quant_config.py)
    """
    from compressed_tensors import __version__
    from compressed_tensors.base import COMPRESSION_VERSION_NAME, TRANSFORM_CONFIG_NAME
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    preset = preset_name_to_scheme(scheme, ["Linear"])
    preset.format = CompressionFormat.float_quantized.value
    config = QuantizationConfig(
        config_groups={scheme: preset},
        ignore=list(IGNORE),
        quantization_status=QuantizationStatus.COMPRESSED,
        format=CompressionFormat.float_quantized.value,
    )
    return {COMPRESSION_VERSION_NAME: __version__, TRANSFORM_CONFIG_NAME: {}, **config.model_dump(mode="json")}


if __name__ == "__main__":
    json.dump({scheme: quantization_config(scheme) for scheme in sys.argv[1:]}, sys.stdout)
