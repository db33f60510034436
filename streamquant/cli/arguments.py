"""Arguments and options that several commands share."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamquant.quant.errors import UsageError

if TYPE_CHECKING:
    from streamquant.model.forward import Setting


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Folder of the checkpoint (config.json, safetensors in BF16, F16 or F32), or ORG/NAME[@REVISION] on the "
        "Hugging Face Hub.",
    ),
]
SpoolGib = Annotated[
    float | None,
    typer.Option(
        help="Most GiB of shards from the Hub that are on the disk at a time. Default: four of the largest shard.",
        min=0,
    ),
]
To = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        help="Variant to make, of those that `streamquant formats` lists; repeatable. GGUF types may be listed: "
        "gguf:Q8_0,Q4_0.",
    ),
]
RecipeFiles = Annotated[
    list[Path] | None,
    typer.Option("--recipe", help="YAML file of a GGUF variant of your own (docs/formats.md); repeatable."),
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Number of worker threads. Default: all cores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Tensors = Annotated[bool, typer.Option("--tensors", help="List every tensor.")]
Original = Annotated[
    str,
    typer.Argument(
        help="The reference: folder of the BF16 checkpoint, ORG/NAME[@REVISION] on the Hub (fetched whole into the "
        "local cache), or any variant taken as the reference."
    ),
]
Variants = Annotated[
    list[Path],
    typer.Argument(help="GGUF files (any file of a split set) and compressed-tensors folders, whoever made them."),
]
Texts = Annotated[
    list[Path], typer.Option("--text", help="UTF-8 text to measure on; repeatable, each file is a category.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda. auto: cuda if there is a GPU.")]
ComputeDType = Annotated[str | None, typer.Option("--dtype", help="bf16 or f32. Default: bf16 on a GPU, f32 on a CPU.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens in a chunk.")]
Chunks = Annotated[int | None, typer.Option(min=1, help="Chunks of each text. Default: all.")]
Scratch = Annotated[Path | None, typer.Option(help="Folder for hidden states that do not fit into memory.")]


def forward_setting(device: str, dtype: str | None, scratch: Path | None) -> "Setting":
    """The setting of a forward pass. Raises UsageError for a device or dtype that does not exist."""
    from streamquant.model.forward import default_setting

    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        raise UsageError("no such device", where="--device", found=device, required="auto, cpu or cuda")
    setting = replace(default_setting(device), scratch=scratch)
    if dtype is None:
        return setting
    if dtype not in ("bf16", "f32"):
        raise UsageError("no such dtype", where="--dtype", found=dtype, required="bf16 or f32")
    return replace(setting, dtype="bf16" if dtype == "bf16" else "f32")


def names_of(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names of a list with commas. Raises UsageError, which names the option, for one that is not known."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in known]:
        raise UsageError("unknown name", where=option, found=", ".join(unknown), required=f"of {', '.join(known)}")
    return names
