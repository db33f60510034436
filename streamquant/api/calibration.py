"""`calibrate`: what the inputs of a model are over samples."""

import os
from collections.abc import Sequence
from pathlib import Path

from streamquant.api.models import Model, local_weights
from streamquant.api.paths import paths_told
from streamquant.calibrate import calibration
from streamquant.calibrate.calibration import CalibrationOptions, CalibrationRun
from streamquant.calibrate.samples import Conversation, Samples, samples_of_jsonl, samples_of_texts
from streamquant.files.listener import SILENT, Listener
from streamquant.files.writing import check_writable, partial_of
from streamquant.model.variants.checkpoint import CheckpointVariant
from streamquant.model.variants.open import open_original
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.engines.engine import TemplateRequest
from streamquant.validate.engines.process import EngineProcess


@paths_told
def calibrate(
    model: Model,
    out: str | Path,
    options: CalibrationOptions | None = None,
    *,
    texts: Sequence[str | Path] = (),
    chat: str | Path | None = None,
    listener: Listener = SILENT,
) -> CalibrationRun:
    """Measure the inputs of the linear layers of a model, and keys and values, over samples; one layer in memory.

    `read_calibration` reads the file for `ConversionOptions`. A call that was interrupted goes on behind the last
    layer whose state was written when it is repeated.

    Args:
        model: the checkpoint that is converted, or ORG/NAME[@REVISION] (fetched whole into the local cache).
        out: the safetensors file to write (docs/calibration.md).
        options: samples and their length, device and dtype, an importance matrix of the same pass.
        texts: UTF-8 files, cut into samples; or
        chat: a JSONL file: conversations (`messages`), which the model's own chat template formats in a process of its
            own, or `text`. A sample a line.
        listener: hears of steps of "layers".

    Raises:
        UsageError: for samples that are none, too short, or of two kinds, and for a model that is no checkpoint.
        StreamquantError: for a file that belongs to other samples, and for a model that cannot be read or computed.
    """
    out, options = Path(out), options or CalibrationOptions()
    if bool(texts) == (chat is not None):
        raise UsageError(
            "samples of one kind", found="both" if texts else "neither", required="--text FILE or --chat FILE"
        )
    for path in (out, *([options.imatrix] if options.imatrix is not None else [])):
        if os.path.lexists(path) and not path.is_file():
            raise UsageError(
                "the output file is a folder, or no file at all", where=str(path), hint="choose another --out"
            )
        check_writable(path.parent, [partial_of(path).name], try_it=True)  # before hours of computing
    if options.setting.scratch is not None:
        check_writable(options.setting.scratch, try_it=True)
    variant = open_original(local_weights(model, listener))
    if not isinstance(variant, CheckpointVariant):
        raise UsageError(
            "a calibration is of the checkpoint that is converted",
            where=str(variant.path),
            found=variant.kind,
            required="a checkpoint folder, or ORG/NAME on the Hub",
        )
    return calibration.calibrate(variant, _samples(variant.path, texts, chat, options), out, options, listener)


def _samples(
    folder: Path, texts: Sequence[str | Path], chat: str | Path | None, options: CalibrationOptions
) -> Samples:
    if chat is None:
        return samples_of_texts([Path(text) for text in texts], folder, options.samples, options.context)

    def render(conversations: Sequence[Conversation]) -> list[Sequence[int] | StreamquantError]:
        if not conversations:
            return []
        requests = [
            TemplateRequest(tuple(chat["messages"]), tuple(chat["tools"]), add_generation_prompt=False)
            for chat in conversations
        ]
        with EngineProcess(folder, kind="transformers", tokenizer_only=True) as tokenizer:
            rendered = tokenizer.apply_template(requests)
        return [
            found.ids
            if found.error is None
            else StreamquantError("the chat template fails on a sample", found=found.error)
            for found in rendered
        ]

    return samples_of_jsonl(Path(chat), folder, options.samples, options.context, render)
