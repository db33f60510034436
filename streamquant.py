"""The command line of streamquant: parse -> call -> exit code.

0 done; 1 a fault of the input or the machine; 2 a wrong command; 130 interrupted (run the same command again).
"""

import gc
import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from convert.checkpoint import open_checkpoint
from convert.conversion import check_disk, check_output_folder, convert, default_jobs
from convert.manifest import versions
from convert.plan import Options, Plan, make_plan
from convert.plan_report import human_bytes, plan_json, plan_view
from convert.recipe import RECIPES, parse_variants
from convert.strict_json import read_json_object
from quant.errors import StreamquantError, UsageError
from validate.inspect import inspect_path
from validate.verify import bytes_to_verify, verify
from validate.verify_report import inspect_json, inspect_view, verify_json, verify_view

app = typer.Typer(
    name="streamquant",
    help="One read of a BF16 Hugging Face checkpoint, every FP8 and GGUF variant of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
WIDE = 160  # columns of tables that go into a file or a pipe
out_console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
error_console = Console(stderr=True, soft_wrap=True, width=None if sys.stderr.isatty() else WIDE)

INTERRUPTED = 130
_VARIANTS = ", ".join(RECIPES)
Model = Annotated[
    Path, typer.Argument(help="Folder of the checkpoint: config.json and safetensors in BF16, F16 or F32.")
]
To = Annotated[
    list[str],
    typer.Option(
        "--to", help=f"Variant to make; repeatable, and GGUF types may be listed: gguf:Q8_0,Q4_0. One of {_VARIANTS}."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the model in file names. Default: the name of its folder.")]
SplitMaxSize = Annotated[
    str | None, typer.Option(help="Split GGUF files at this many bytes of tensors, e.g. 40G (decimal, as llama.cpp).")
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Largest FP8 shard, e.g. 5G. Default: the shards of the source.")
]
Pre = Annotated[str | None, typer.Option(help="tokenizer.ggml.pre, where it cannot be told from tokenizer.json.")]
Metadata = Annotated[
    Path | None, typer.Option(help="JSON file of GGUF keys that override the model card (llama.cpp's --metadata).")
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Worker threads. Default: all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]


@app.command("plan")
def plan_command(
    model: Model,
    to: To,
    out: Annotated[
        Path | None, typer.Option(help="Also check that this folder could be written and its disk is large enough.")
    ] = None,
    name: Name = None,
    split_max_size: SplitMaxSize = None,
    max_shard_size: MaxShardSize = None,
    pre: Pre = None,
    metadata: Metadata = None,
    jobs: Jobs = None,
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Print what a conversion would write: exact bytes, formats and reasons. No weight is read.

    Example: `streamquant plan Hermes-4-14B --to fp8-dynamic --to gguf:Q8_0,Q4_0`
    """
    checkpoint = open_checkpoint(model)
    plan = make_plan(checkpoint, parse_variants(to), _options(name, split_max_size, max_shard_size, pre, metadata))
    if out is not None:
        check_output_folder(checkpoint, out, [variant.folder for variant in plan.variants])
        check_disk(plan, out)
    _print(
        plan_json(plan, jobs or default_jobs()) if as_json else plan_view(plan, jobs or default_jobs(), tensors=tensors)
    )


@app.command("convert")
def convert_command(
    model: Model,
    to: To,
    out: Annotated[Path, typer.Option(help="Folder for the variants; each gets a folder of its own in it.")],
    name: Name = None,
    split_max_size: SplitMaxSize = None,
    max_shard_size: MaxShardSize = None,
    pre: Pre = None,
    metadata: Metadata = None,
    jobs: Jobs = None,
) -> None:
    """Make every variant from one read of the checkpoint. Stopped? The same command goes on where it was.

    Examples:

    `streamquant convert Hermes-4-14B --to fp8-dynamic --out variants`

    `streamquant convert Hermes-4-14B --to fp8-dynamic --to gguf:BF16,Q8_0,Q4_0 --split-max-size 40G --out variants`
    """
    options = _options(name, split_max_size, max_shard_size, pre, metadata)
    with _progress("converting") as bar:

        def start(plan: Plan) -> None:
            bar.total(sum(m.source.stop - m.source.start for m in plan.matrices))
            if error_console.is_terminal:
                error_console.print(plan_view(plan, jobs or default_jobs()))

        done = convert(
            open_checkpoint(model),
            parse_variants(to),
            out,
            options,
            jobs=jobs or default_jobs(),
            on_start=start,
            on_progress=bar.advance,
        )
    for variant in done.plan.variants:
        state = "was done already" if variant.recipe.spec in done.already_done else "done"
        size = human_bytes(done.plan.variant_bytes(variant))
        out_console.print(f"{variant.recipe.spec}: {state}, {size} in {out / variant.folder}", highlight=False)
    if done.resumed_chunks:
        out_console.print(f"resumed: {done.resumed_chunks} of {len(done.plan.chunks)} chunks were written before")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A .gguf or .safetensors file, or a folder of them.", exists=True)],
    as_json: AsJson = False,
    tensors: Tensors = False,
) -> None:
    """Show tensors, types, bytes and metadata of any GGUF or safetensors file.

    Example: `streamquant inspect variants/Hermes-4-14B-GGUF/Hermes-4-14B-Q8_0.gguf --tensors`
    """
    files = inspect_path(path)
    _print(inspect_json(files) if as_json else inspect_view(files, tensors=tensors))


@app.command("verify")
def verify_command(
    folder: Annotated[
        Path, typer.Argument(help="A folder that convert wrote, or the --out folder that holds several.")
    ],
    source: Annotated[
        Path | None, typer.Option(help="Also encode the source again and compare; prints the error (SQNR).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read back what was written: hashes against the manifest and, with --source, every byte against the checkpoint.

    Exit code 1 if anything differs. Example: `streamquant verify variants --source Hermes-4-14B`
    """
    checkpoint = open_checkpoint(source) if source is not None else None
    with _progress("verifying") as bar:
        bar.total(bytes_to_verify(folder, with_source=source is not None))
        results = verify(folder, checkpoint, on_progress=bar.advance)
    _print(verify_json(results) if as_json else verify_view(results))
    if any(result.problems for result in results):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False) -> None:
    if version:
        _print(versions())
        raise typer.Exit


def _options(
    name: str | None, split_max_size: str | None, max_shard_size: str | None, pre: str | None, metadata: Path | None
) -> Options:
    overrides = read_json_object(metadata) if metadata is not None else {}
    return Options(
        name, _size("--split-max-size", split_max_size), _size("--max-shard-size", max_shard_size), pre, overrides
    )


def _size(option: str, text: str | None) -> int | None:
    """A size as llama.cpp writes it: 500M, 40G; decimal."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise UsageError("not a size", where=option, found=repr(text), required="a number with K, M, G or T, like 40G")
    exponent = " KMGT".index(match[2] or " ")
    return int(match[1]) * int(1000**exponent)


def _print(value: Any) -> None:
    if isinstance(value, dict | list):
        sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
    else:
        out_console.print(value)


class _Bar:
    """A progress bar, or nothing where the output is not a terminal."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None)

    def total(self, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)


@contextmanager
def _progress(what: str) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(
            *columns, console=error_console, disable=not error_console.is_terminal, transient=True
        ) as progress:
            yield _Bar(progress, what)
    except KeyboardInterrupt:
        error_console.print("interrupted; the same command goes on where it stopped", markup=False)
        raise typer.Exit(INTERRUPTED) from None


def _terminated(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminated)
    gc.freeze()  # what was imported stays, and a vocabulary of 400,000 strings is no garbage either:
    gc.set_threshold(200_000, 20, 100)  # walking them again and again costs a tenth of a second
    try:
        app()
    except StreamquantError as error:
        error_console.print(f"error: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)


if __name__ == "__main__":
    main()
