"""`calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

import streamquant
from streamquant.cli.arguments import Device, Scratch, forward_setting
from streamquant.cli.console import print_line
from streamquant.cli.progress import console_listener
from streamquant.files.folders import check_working_folder


def calibrate_command(
    model: Annotated[
        str, typer.Argument(help="Folder of the checkpoint that is converted, or ORG/NAME[@REVISION] on the Hub.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, safetensors.")],
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 text that is cut into samples; repeatable.")
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file, a sample in each line: `messages`, which the model's chat template formats, or `text`."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples, at most.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sample, at most.")] = 2048,
    imatrix: Annotated[
        Path | None, typer.Option(help="Also write the importance matrix of the same pass, for --imatrix: a GGUF file.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="bf16, as llm-compressor computes, or f32.")] = "bf16",
    scratch: Scratch = None,
) -> None:
    """Measure the inputs of linear layers, keys and values over texts or chats, for `--calibration`.

    One pass over the weights, one layer in memory. Run the same command again to continue after a stop.

    Examples:

    `streamquant calibrate Hermes-4-14B --chat conversations.jsonl --out calibration.safetensors`

    `streamquant calibrate Hermes-4-14B --text prose.txt --text code.txt --samples 128 --context 1024
    --out calibration.safetensors --imatrix imatrix.gguf`
    """
    check_working_folder()
    options = streamquant.CalibrationOptions(forward_setting(device, dtype, scratch), samples, context, imatrix)
    with console_listener() as listener:
        done = streamquant.calibrate(model, out, options, texts=text or (), chat=chat, listener=listener)
    state = ", done before" if done.already_done else ""
    if done.resumed_after is not None:
        state = f", resumed after layer {done.resumed_after}"
    print_line(f"{done.modules} modules over {done.samples} samples, {done.tokens:,} tokens{state}, in {done.path}")
    for note in done.notes:
        print_line(f"note: {note}")
