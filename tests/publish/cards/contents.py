"""What the tests of model cards share: folders with cards, and what a card says."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markdown_it
import yaml
from markdown_it.token import Token

from streamquant.convert.manifest import MANIFEST
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.results import CARD
from streamquant.validate.report.data import Report, write_report

BASE = """---
license: llama3
license_link: LICENSE
language:
- en
- no
tags:
- function calling
- reasoning
- fp8
pipeline_tag: text-generation
---
# The original
"""
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
OPTIONS = CardOptions(base_model="NousResearch/Tiny", repo="ORG/Tiny", prompts=False)
HOSTILE = "<script>alert(1)</script>\"'|`[x](javascript:y) $\\frac$ \u202egnp.\x1b[31m {{7*7}} &lt; ![i](//e)\n---\n- a"
PROGRAMS = {"hf", "llama-cli", "llama-server", "llama-gguf-split", "lms", "ollama", "vllm", "python", "streamquant"}


def fill(out: Path, four_variants: list[Path], report: Report) -> None:
    """An --out folder with its report, as convert and validate leave it for an original with a card."""
    shutil.copytree(four_variants[0].parent, out)
    fp8 = out / "Tiny-FP8-dynamic"
    before = (fp8 / MANIFEST).stat()
    (fp8 / CARD).write_text(BASE)
    (fp8 / "LICENSE").write_text("Be good.")
    (fp8 / "generation_config.json").write_text(json.dumps(SAMPLING))
    os.utime(fp8 / CARD, ns=(before.st_mtime_ns, before.st_mtime_ns))
    write_report(report, out / "report")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def front(card: Path) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(), re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def tokens(card: Path) -> list[Token]:
    """The body as Markdown, with what is inside of paragraphs and cells."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card.read_text(), flags=re.DOTALL)
    flat = []
    for token in markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(body):
        flat += [token, *(token.children or ())]
    return flat


def blocks(card: Path, language: str) -> list[str]:
    return [token.content for token in tokens(card) if token.type == "fence" and token.info == language]


def table(card: Path, heading: str) -> list[list[str]]:
    """Rows of the first table with this in its head, as Markdown."""
    rows = [line for line in card.read_text().splitlines() if line.startswith("|")]
    first = next(number for number, line in enumerate(rows) if heading in line)
    found = []
    for line in rows[first + 2 :]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != len(re.split(r"(?<!\\)\|", rows[first])) - 2 or set(cells[0]) == {"-"}:
            break
        found.append(cells)
    return found
