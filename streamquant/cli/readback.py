"""`inspect`, `verify` and `recipe`: what is in a file."""

import os
from pathlib import Path
from typing import Annotated

import typer

import streamquant
from streamquant.cli.arguments import AsJson, Tensors
from streamquant.cli.console import print_result, print_text, say_note
from streamquant.cli.progress import console_listener
from streamquant.quant.errors import UsageError


def inspect_command(
    path: Annotated[Path, typer.Argument(help="A .gguf or .safetensors file, or a folder of them.", exists=True)],
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Show tensors, types, bytes and metadata of any GGUF or safetensors file.

    Example: `streamquant inspect variants/Hermes-4-14B-GGUF/Hermes-4-14B-Q8_0.gguf --tensors`
    """
    from streamquant.validate.readback.verify_report import inspect_json, inspect_view

    files = streamquant.inspect(path)
    print_result(inspect_json(files) if as_json else inspect_view(files, tensors=tensors))


def verify_command(
    folder: Annotated[
        Path, typer.Argument(help="A folder that convert wrote, or the --out folder that holds several.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            help="Also encode the source again and compare; prints the error (SQNR). A folder, or ORG/NAME[@REVISION]."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The importance matrix that the variants were made with; --source needs it.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The calibration that the variants were made with; --source needs it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read back what was written: compare hashes with the manifest and, with --source, every byte with the checkpoint.

    The exit code is 1 if anything differs. Example: `streamquant verify variants --source Hermes-4-14B`
    """
    from streamquant.validate.readback.verify_report import verify_json, verify_view

    matrix = streamquant.read_imatrix(imatrix) if imatrix is not None else None
    measured = streamquant.read_calibration(calibration) if calibration is not None else None
    with console_listener() as listener:
        results = streamquant.verify(folder, source, matrix, calibration=measured, listener=listener)
    print_result(verify_json(results) if as_json else verify_view(results))
    if any(result.problems for result in results):
        raise typer.Exit(1)


def recipe_command(
    path: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file; any file of a split set.")],
    out: Annotated[Path | None, typer.Option(help="File to write. Default: standard output.")] = None,
    label: Annotated[str | None, typer.Option(help="Label of the variant. Default: its file type and -like.")] = None,
) -> None:
    """Write the recipe of a GGUF: its file type and every tensor that differs, for `--recipe`. Reads the header only.

    Example: `streamquant recipe Model-UD-Q4_K_XL.gguf --label UD-like --out ud.yaml`
    """
    from streamquant.files.writing import explain, write_atomically

    if out is not None and os.path.lexists(out):
        raise UsageError("the output file exists already", where=str(out), hint="choose another --out")
    found = streamquant.recipe(path, label)
    text = found.recipe.yaml()
    for note in found.notes:
        say_note(note)
    if out is None:
        print_text(text)
    else:
        try:
            write_atomically(out, text.encode())
        except OSError as error:
            raise explain(error, out) from error
