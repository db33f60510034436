"""The table of all variants in docs/formats.md: `python -m tests.docs.variants_table` prints it."""

import sys

from streamquant.convert.recipes.catalogue import variants

HEADER = "| `--to` | bits per weight | importance matrix | runs in | what it is |"


def variants_table() -> str:
    """The table in Markdown, made from the catalogue."""
    rows = [
        f"| `{entry.spec}` | {entry.size} | {entry.measured} | {', '.join(entry.runtimes)} | {entry.about} |"
        for entry in variants()
    ]
    return "\n".join([HEADER, "| --- | --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    sys.stdout.write(f"{variants_table()}\n")
