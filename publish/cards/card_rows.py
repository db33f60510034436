"""The table of variants in a card, and which variant it advises."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamquant.files.sizes import human_bytes
from streamquant.publish.cards.markdown_helpers import link
from streamquant.publish.results import PublishedVariant, VariantFolder
from streamquant.validate.gates import option
from streamquant.validate.logits.divergence import Divergence
from streamquant.validate.report.text import Markdown, code
from streamquant.validate.report.view import REMARKS, Row, View, cell

NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class CardRow:
    """A variant in the table of files; texts are ready to print."""

    variant: PublishedVariant
    status: Literal["pass", "warn", "fail", "none"]
    link: Markdown
    size: str
    bits: str
    split: str
    kld: str
    ppl_ratio: str
    same_top: str
    remark: str
    measured: Row | None
    """Of the report, in its published form."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Advice: what for, and which."""

    words: str
    row: CardRow


def make_row(variant: PublishedVariant, folder: VariantFolder, view: View | None) -> CardRow:
    """The row of a variant; `view` is that of the report."""
    measured = _measured(variant, view)
    result = None if measured is None else measured.result
    numbers = (NOT_MEASURED,) * 3
    if measured is not None and result is not None:
        numbers = (cell(measured.kld), cell(measured.ppl_ratio), cell(measured.same_top, "%"))
    return CardRow(
        variant=variant,
        status="none" if measured is None else "pass" if variant.passed and measured.status == "pass"
        else "warn" if variant.passed else "fail",
        link=_link(variant, folder),
        size=human_bytes(variant.nbytes),
        bits=f"{variant.made.bits_per_weight:.2f}",
        split="no" if len(variant.files) == 1 else f"{len(variant.files)} files",
        kld=numbers[0],
        ppl_ratio=numbers[1],
        same_top=numbers[2],
        remark=_remark(variant, measured, folder.variants),
        measured=measured,
    )  # fmt: skip


def _measured(variant: PublishedVariant, view: View | None) -> Row | None:
    """The report's row: the published form has the same variants in the same order."""
    found = variant.measurement
    if view is None or found is None:
        return None
    at = next(at for at, about in enumerate(found.report.variants) if about is found.variant)
    return view.rows[at]


def _link(variant: PublishedVariant, folder: VariantFolder) -> Markdown:
    first = variant.files[0]
    if folder.container.is_checkpoint:
        return code(first.path if len(variant.files) == 1 else "model-*.safetensors")
    if len(variant.files) == 1 or "/" not in first.path:
        return link(first.path, first.path)
    parent = first.path.rpartition("/")[0]
    return link(f"{parent}/", parent)


def _remark(variant: PublishedVariant, measured: Row | None, variants: Sequence[PublishedVariant]) -> str:
    """What was found, then what the type is; nothing that a number does not carry."""
    parts = [_note(variant)]
    if measured is None:
        return _sentence([NOT_MEASURED, *parts])
    parts.insert(0, measured.remark)
    assert variant.measurement is not None
    if (better := _better(variant, variants)) is not None:
        parts.append(f"larger than {better.label} and further from the original")
    if variant.measurement.failed_gates:
        gates = ", ".join(option(gate.gate) for gate in variant.measurement.failed_gates)
        parts.insert(0, f"failed {gates}")
    return _sentence(parts)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return text[:1].upper() + text[1:]


def _note(variant: PublishedVariant) -> str:
    """What the variant is, without a claim of quality: its recipe file's own words, or the record's."""
    made = variant.made
    return made.recipe.remark if made.recipe.file is None else made.description


def _divergence(variant: PublishedVariant) -> Divergence | None:
    found = variant.measurement
    return None if found is None or found.result is None else found.result.overall


def _better(variant: PublishedVariant, variants: Sequence[PublishedVariant]) -> PublishedVariant | None:
    """A variant that is smaller and surely closer to the original: by more than two standard errors of both."""
    ours = _divergence(variant)
    for other in sorted(variants, key=lambda item: item.nbytes):
        theirs = _divergence(other)
        if ours is None or theirs is None or other.nbytes >= variant.nbytes or not other.passed:
            continue
        errors = [found.kld.error_by_chunk or found.kld.error or 0.0 for found in (ours, theirs)]
        if ours.kld.value - theirs.kld.value > 2 * math.hypot(*errors):
            return other
    return None


# Advice


def choices_among(rows: Sequence[CardRow]) -> list[Choice]:
    """The smallest variant of each class of closeness, if it is smaller than that of the class before."""
    found: list[Choice] = []
    passed = [row for row in rows if row.variant.passed and _divergence(row.variant) is not None]
    words = ("practically the original", "very close to the original", "close to the original")
    for (limit, _), text in zip(REMARKS, words, strict=False):
        within = [row for row in passed if _kld(row) <= limit]
        smallest = min(within, key=lambda row: row.variant.nbytes, default=None)
        if smallest is not None and all(choice.row is not smallest for choice in found):
            found.append(Choice(text, smallest))
    return found


def _kld(row: CardRow) -> float:
    found = _divergence(row.variant)
    assert found is not None
    return found.kld.value


def pick_for_examples(rows: Sequence[CardRow]) -> CardRow:
    """For the examples: the smallest that is close to the original; without numbers Q4_K_M, what most people run."""
    choices = choices_among(rows)
    if choices:
        return choices[-1].row
    passed = [row for row in rows if row.variant.passed]
    usual = [row for row in rows if row.variant.label == "Q4_K_M"]
    return (usual or passed or list(rows))[-1]
