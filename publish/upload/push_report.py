"""A push for people: a table of files, and a line for each repository."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamquant.files.sizes import human_bytes
from streamquant.publish.upload.push import Pushed


def push_view(pushed: Sequence[Pushed]) -> RenderableType:
    """What a dry run found: every file, what would become of it, and why."""
    return Group(*(part for one in pushed for part in _one(one)))


def _one(pushed: Pushed) -> list[RenderableType]:
    table = Table("file", box=None, header_style="bold", pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("action")
    table.add_column("why")
    for action in pushed.actions:
        style = "" if action.action == "upload" else "dim"
        table.add_row(Text(action.path, style), human_bytes(action.size), action.action, action.why, style=style)
    state = "would be made" if pushed.made else "is there"
    head = Text(f"{pushed.folder} -> {pushed.repo} ({state})", style="bold")
    total = Text(f"{human_bytes(pushed.upload_bytes)} to upload")
    return [head, table, total, *(Text(f"note: {note}") for note in pushed.notes), Text("")]


def summary(pushed: Pushed) -> str:
    """One line on what was done."""
    uploads = [action for action in pushed.actions if action.action == "upload"]
    skipped = sum(action.action == "skip" for action in pushed.actions)
    if not uploads:
        return f"{pushed.folder}: everything is in {pushed.url} already"
    there = f", {skipped} were there already" if skipped else ""
    noun = "file" if len(uploads) == 1 else "files"
    return f"{pushed.folder}: {len(uploads)} {noun}, {human_bytes(pushed.upload_bytes)} to {pushed.url}{there}"
