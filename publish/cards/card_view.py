"""A variant folder as its card shows it: rows and sentences that the templates of FP8 and GGUF share."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import constants

from streamquant.convert.manifest import ManifestFile
from streamquant.files.sizes import human_bytes
from streamquant.publish.cards import commands
from streamquant.publish.cards.prompts import PromptFormat
from streamquant.publish.cards.public_report import PublicReport
from streamquant.publish.results import PublishedVariant, VariantFolder
from streamquant.validate.gates import GATES, option
from streamquant.validate.logits.divergence import Divergence
from streamquant.validate.report.text import MISSING, Markdown, code, estimate, markdown, number, visible
from streamquant.validate.report.view import REMARKS, Row, View, cell, engine_name, make_view, short, wrong_chats

HUB = constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")
"""For links of a card, whatever HF_ENDPOINT says where it is made."""
NOT_MEASURED = "not measured"
MARKS = {"pass": "✅", "warn": "⚠️", "fail": "❌", "none": "⚪"}
_NOTES = (
    (r"F32|F16|BF16", "not quantized"),
    (r"Q\d_K_(L|XL)", "embeddings and output at Q8_0"),
    (r"Q[45]_[01]", "legacy type"),
    (r"IQ4_.*", "non-linear 4 bits"),
    (r"MXFP4_MOE", "experts at MXFP4"),
    (r"TQ\d_0", "for ternary models"),
)
"""What a label says without a claim of quality; Q3_K_L is a mix of llama-quantize and no larger ends (see _note)."""
FP8 = {
    "fp8-dynamic": (
        "Weights of linear layers are FP8 E4M3 with one scale for each output channel; activations are quantized to "
        "FP8 at run time, with one scale for each token. Embeddings, norms and the output layer stay as in the "
        "original. No calibration data was needed."
    ),
    "fp8-block": (
        "Weights of linear layers are FP8 E4M3 with one scale for each block of 128 x 128; activations are quantized "
        "to FP8 at run time, in groups of 128. Embeddings, norms and the output layer stay as in the original. No "
        "calibration data was needed."
    ),
}


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


@dataclass(frozen=True, slots=True)
class CardView:
    """Everything that the templates need beside the folder itself."""

    title: str
    repo: str | None
    name: str
    """Of the repository, or of the local folder."""
    rows: tuple[CardRow, ...]
    not_passed: tuple[CardRow, ...]
    unmeasured: tuple[tuple[str, tuple[str, ...]], ...]
    """(reason, labels)"""
    choices: tuple[Choice, ...]
    pick: CardRow
    """For the examples."""
    report: View | None
    problems: tuple[tuple[str, str, str], ...]
    """(mark, label, what)"""
    limits: str
    """Gates that were set, as a sentence lists them."""
    against: str | None
    """The original of the report, if it is not the source."""
    made: tuple[commands.Made, ...]
    imatrices: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    """(record, labels of the variants that were made with it)"""
    guarded: tuple[str, ...]
    """Labels of variants with a guarded template."""
    versions: tuple[tuple[str, str], ...]
    formats: tuple[tuple[str, str], ...]
    """(label, formats with their number of tensors)"""


def make_card_view(folder: VariantFolder, repo: str | None, public: PublicReport | None) -> CardView:
    """What a card shows. `public` is the published form of the folder's report."""
    view = None if public is None else make_view(public.report)
    rows = tuple(_row(variant, folder, view) for variant in folder.variants)
    measured = [row for row in rows if row.variant.measurement is not None]
    first = measured[0].variant.measurement if measured else None
    return CardView(
        title=folder.path.resolve().name if repo is None else repo.partition("/")[2],
        repo=repo,
        name=repo or folder.path.resolve().name,
        rows=rows,
        not_passed=tuple(row for row in measured if not row.variant.passed),
        unmeasured=_grouped((row.variant.why_not, row.variant.label) for row in rows if row.variant.why_not),
        choices=tuple(_choices(rows)),
        pick=_pick(rows),
        report=view,
        problems=tuple(_problems(measured)),
        limits="" if first is None else _limits(first.report.gates.limits()),
        against=None if first is None or first.against_source else first.report.comparison.original.model.label,
        made=tuple(commands.made_by(folder)),
        imatrices=_imatrices(folder),
        guarded=tuple(variant.label for variant in folder.variants if variant.made.options.guard_template),
        versions=_versions(folder.variants),
        formats=tuple((row.variant.label, _formats(row.variant)) for row in rows),
    )


# The table


def _row(variant: PublishedVariant, folder: VariantFolder, view: View | None) -> CardRow:
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
    if variant.made.recipe.file is not None:
        return variant.made.description
    if variant.label == "Q3_K_L":
        return ""
    return next((note for shape, note in _NOTES if re.fullmatch(shape, variant.label)), "")


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


def _choices(rows: Sequence[CardRow]) -> list[Choice]:
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


def _pick(rows: Sequence[CardRow]) -> CardRow:
    """For the examples: the smallest that is close to the original; without numbers Q4_K_M, what most people run."""
    choices = _choices(rows)
    if choices:
        return choices[-1].row
    passed = [row for row in rows if row.variant.passed]
    usual = [row for row in rows if row.variant.label == "Q4_K_M"]
    return (usual or passed or list(rows))[-1]


# The report


def _problems(rows: Sequence[CardRow]) -> list[tuple[str, str, str]]:
    marks = {"error": MARKS["fail"], "warning": MARKS["warn"], "note": "ℹ️"}
    return [
        (marks[problem.severity], row.variant.label, short(problem))
        for row in rows
        if row.measured is not None
        for problem in row.measured.variant.problems
    ]


def _limits(limits: Mapping[str, float]) -> str:
    """Gates that were set; a reader who sees none on the divergence should know it."""
    said = [
        f"{GATES[gate]} at {'least' if gate.startswith('min') else 'most'} {number(limit)}"
        for gate, limit in limits.items()
    ]
    if not limits.keys() & {"max_mean_kld", "max_kld_99_9", "min_same_top", "max_ppl_ratio"}:
        said.append("no limit on the divergence")
    return ", ".join(said)


def _grouped(pairs: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    groups: dict[str, list[str]] = {}
    for reason, label in pairs:
        groups.setdefault(reason, []).append(label)
    return tuple((reason, tuple(labels)) for reason, labels in groups.items())


# How it was made


def _imatrices(folder: VariantFolder) -> tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]:
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for variant in folder.variants:
        if (made := variant.made.imatrix) is not None:
            name = file_name(made.file)
            record = {
                "file": link(name, name) if made.sha256 in folder.matrices else code(name),
                "datasets": [file_name(text) for text in made.datasets],
                "chunks": made.chunks,
                "entries": made.entries,
                "sha256": made.sha256,
            }
            groups.setdefault(repr(record), (record, []))[1].append(variant.label)
    return tuple((record, tuple(labels)) for record, labels in groups.values())


def _versions(variants: Sequence[PublishedVariant]) -> tuple[tuple[str, str], ...]:
    """Package -> version; several where variants were made at different times."""
    found: dict[str, dict[str, None]] = {}
    for variant in variants:
        for name, text in variant.made.versions.items():
            found.setdefault(name, {})[text] = None
    return tuple((name, ", ".join(texts)) for name, texts in sorted(found.items()))


def _formats(variant: PublishedVariant) -> str:
    return ", ".join(f"{name} x {count}" for name, count in variant.made.formats.items())


# What the templates call


def file_name(path: object) -> str:
    """The last part of a path of any system.

    >>> file_name("/home/me/calibration.txt"), file_name("C:\\\\texts\\\\a.txt")
    ('calibration.txt', 'a.txt')
    """
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def fence(text: object, language: str = "") -> Markdown:
    """Lines as a fenced block that nothing in them can close; characters that hide are shown as escapes.

    >>> fence("a", "bash"), fence("```")
    ('```bash\\na\\n```', '````\\n```\\n````')
    """
    lines = [_code_line(line) for line in str(text).split("\n")]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    marks = "`" * max(3, longest + 1)
    return Markdown("\n".join([f"{marks}{language}", *lines, marks]))


def _code_line(line: str) -> str:
    return "\t".join(map(visible, line.split("\t")))


def link(text: str, target: str) -> Markdown:
    """A link to a file of the repository, whatever it is called.

    >>> link("a_b", "b c.gguf")
    '[a\\\\_b](b%20c.gguf)'
    """
    return Markdown(f"[{markdown(text)}]({quote(target, safe='/-._~')})")


def whole(text: str) -> Markdown:
    """A number for a narrow cell: its error, if it has one, in a second line, and no other break.

    >>> whole("0.1 ± 0.2"), whole("1.20 GB") == "1.20\xa0GB"
    ('0.1<br>±\xa00.2', True)
    """
    return Markdown(markdown(text).replace(" ± ", "<br>± ").replace(" ", "\xa0"))


def labels(names: Sequence[str]) -> Markdown:
    """Names as code, as a sentence lists them.

    >>> labels(["a", "b", "c"])
    '`a`, `b` and `c`'
    """
    spans = [code(name) for name in names]
    return Markdown(spans[0] if len(spans) == 1 else f"{', '.join(spans[:-1])} and {spans[-1]}")


def checksums(files: Sequence[ManifestFile]) -> Markdown:
    """For `sha256sum --check`."""
    return fence("\n".join(f"{file.sha256}  {file.path}" for file in files))


def hub_link(repo: str) -> Markdown:
    """The page of a repository, as the target of a link."""
    return Markdown(f"{HUB}/{quote(repo, safe='/-._~')}")


def python_example(name: str, prompts: PromptFormat | None) -> str:
    """transformers' way to an answer."""
    model = json.dumps(name)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({model})",
        f'model = AutoModelForCausalLM.from_pretrained({model}, dtype="auto", device_map="auto")',
    ]
    if prompts is None or not prompts.prompts:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)')
    else:
        switch = f", {prompts.thinking}" if prompts.thinking else ""
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{switch}',
            ").to(model.device)",
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=1024)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


HELPERS: Mapping[str, Callable[..., object] | object] = {
    "MARKS": MARKS,
    "MISSING": MISSING,
    "FP8": FP8,
    "cell": cell,
    "checksums": checksums,
    "commands": commands,
    "engine_name": engine_name,
    "fence": fence,
    "estimate": estimate,
    "hub_link": hub_link,
    "human_bytes": human_bytes,
    "labels": labels,
    "link": link,
    "number": number,
    "option": option,
    "python_example": python_example,
    "wrong_chats": wrong_chats,
}
