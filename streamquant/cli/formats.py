"""`formats`: what can be made of which models."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

import streamquant
from streamquant.cli.arguments import AsJson
from streamquant.cli.console import print_result

if TYPE_CHECKING:
    from streamquant.convert.recipes.catalogue import CatalogueFamily, CatalogueVariant


def formats_command(as_json: AsJson = False) -> None:
    """List all variants that can be made and all model families that can be converted.

    For each variant: its size in bits per weight, counted over the tensors of Llama 2 7B; whether an importance matrix
    is required, optional or unused, or a calibration required; and what runs it.

    Example: `streamquant formats`
    """
    found = streamquant.formats()
    if as_json:
        print_result(asdict(found))
    else:
        print_result(Group(_variants_table(found.variants), Text(), _families_table(found.families)))


def _variants_table(entries: "tuple[CatalogueVariant, ...]") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("--to")
    table.add_column("bits/weight", justify="right")
    for name in ("importance matrix", "runs in", "what it is"):
        table.add_column(name)
    for entry in entries:
        table.add_row(entry.spec, entry.size, entry.measured, ", ".join(entry.runtimes), entry.about)
    return table


def _families_table(entries: "tuple[CatalogueFamily, ...]") -> Table:
    table = Table("model class", "GGUF architecture", box=None, header_style="bold", pad_edge=False)
    for entry in entries:
        table.add_row(entry.hf_architecture, entry.gguf_arch)
    return table
