"""`imatrix`."""

from pathlib import Path
from typing import Annotated

import typer

import streamquant
from streamquant.cli.arguments import Chunks, ComputeDType, Context, Device, Scratch, Texts, forward_setting
from streamquant.cli.console import print_line
from streamquant.cli.progress import console_listener
from streamquant.files.folders import check_working_folder


def imatrix_command(
    model: Annotated[
        str, typer.Argument(help="Folder of the checkpoint, ORG/NAME[@REVISION] on the Hub, or any variant of it.")
    ],
    text: Texts,
    out: Annotated[Path, typer.Option(help="File to write, in llama.cpp's GGUF format; an existing one is continued.")],
    device: Device = "auto",
    dtype: ComputeDType = None,
    context: Context = 512,
    chunks: Chunks = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Save after this many chunks; each round reads all weights. Default: one round."),
    ] = None,
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Read special tokens in the texts as tokens, not as letters: for texts that are formatted chats.",
        ),
    ] = False,
    scratch: Scratch = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json for the texts, if MODEL has none (a GGUF).")
    ] = None,
) -> None:
    """Compute the importance matrix of a model over texts, for `--imatrix` and llama-quantize.

    Example: `streamquant imatrix Hermes-4-14B --text calibration.txt --out imatrix.gguf --save-every 50`
    """
    check_working_folder()
    options = streamquant.ImportanceOptions(forward_setting(device, dtype, scratch), save_every, parse_special)
    with console_listener("run the same command again; it uses what is in the cache") as listener:
        done = streamquant.imatrix(
            model, text, out, options, context=context, chunks=chunks, tokenizer=tokenizer, listener=listener
        )
    resumed = f", {done.resumed_from} of them from before" if done.resumed_from else ""
    line = f"{done.entries} tensors over {done.chunks} chunks of {context} tokens{resumed} in {done.path}"
    print_line(line)
    for note in done.notes:
        print_line(f"note: {note}")
