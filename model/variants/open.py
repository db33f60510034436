"""Opens whatever variant stands at a path."""

from dataclasses import replace
from pathlib import Path

from streamquant.convert.source.checkpoint import as_source, read_checkpoint, with_fitting_config
from streamquant.convert.source.config_as_stored import config_of_mtp_layers
from streamquant.convert.source.weights import CONFIG, INDEX, SINGLE_FILE
from streamquant.files.gguf_file import first_of_split
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.compressed import METHODS, CompressedVariant
from streamquant.model.variants.folder import QUANTIZATION_KEYS
from streamquant.model.variants.gguf import GgufVariant
from streamquant.model.variants.quantized import QuantizedVariant
from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import UsageError


def open_variant(path: Path) -> Variant:
    """Open a checkpoint folder, plain or quantized, a GGUF file, any file of a split set, or its folder.

    Reads headers only. Raises UsageError if there is no such thing at `path`, StreamquantError for what is broken or
    unknown: a truncated or missing split, a missing tensor, a wrong shape, an architecture or type without a decoder.
    """
    if path.is_file() or path.suffix == ".gguf":
        if path.suffix != ".gguf":
            raise UsageError("not a variant", where=str(path), required="a .gguf file or a checkpoint folder")
        return GgufVariant(path)
    if not path.is_dir():
        raise UsageError("no such variant", where=str(path), required="a .gguf file or a checkpoint folder")
    if any((path / name).exists() for name in (CONFIG, INDEX, SINGLE_FILE)):
        return _open_folder(path)
    return open_variant(_only_gguf(path))


def open_original(path: Path) -> Variant:
    """The original that variants are measured against: as `open_variant`, but a quantized source of `convert` is its
    dequantized weights, and its activations are left alone. Raises as `open_variant` does, and for a checkpoint with
    tensors that its config.json does not explain."""
    if path.is_dir() and (path / CONFIG).exists():
        source = as_source(read_checkpoint(path))
        if source.quantized is not None:
            return _explained(CheckpointVariant(source))
    variant = open_variant(path)
    return _explained(variant) if isinstance(variant, CheckpointVariant) else variant


def _explained(original: CheckpointVariant) -> CheckpointVariant:
    """A checkpoint that `convert` takes too: one with other layers than config.json says is not measured in part."""
    original.check_explained()
    return original


def _open_folder(folder: Path) -> Variant:
    checkpoint = read_checkpoint(folder)
    as_it_is = with_fitting_config(checkpoint)
    key = next((key for key in QUANTIZATION_KEYS if checkpoint.config.get(key) is not None), None)
    quantization = None if key is None else checkpoint.config[key]
    # A folder that says it is of compressed-tensors is taken at its word: its runtimes do that too, and fail.
    is_compressed = isinstance(quantization, dict) and quantization.get("quant_method") in METHODS
    if not is_compressed and isinstance(quantization, dict):
        source = as_source(checkpoint)
        if source.quantized is not None:
            return QuantizedVariant(checkpoint, source, quantization, f"{folder / CONFIG}, {key}")
    if is_compressed or key in as_it_is.config:
        config, _ = config_of_mtp_layers(checkpoint.config, checkpoint.tensors)
        return CompressedVariant(replace(checkpoint, config=config))
    return CheckpointVariant(as_it_is)


def _only_gguf(folder: Path) -> Path:
    """The one GGUF file, or the first file of the one split set, of a folder."""
    found = sorted({first_of_split(path) for path in folder.glob("*.gguf")})
    if len(found) != 1:
        raise UsageError(
            "not one variant",
            where=str(folder),
            found=", ".join(path.name for path in found) or "neither config.json nor .gguf files",
            required="a checkpoint folder, or one .gguf file",
        )
    return found[0]
