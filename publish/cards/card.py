"""Model cards: README.md for every variant folder, from its manifest and the report of exactly these files.

Names, licences, tags, templates and reports are strangers' text: YAML comes from a safe dumper, every value in the
Markdown is escaped unless a helper made it Markdown, and the Hub client's own ModelCard must read back what was meant.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # exported, but not by name
from jinja2 import Environment, PackageLoader, StrictUndefined

from streamquant.convert.manifest import MANIFEST
from streamquant.convert.recipes.container import GGUF, SAFETENSORS
from streamquant.files.writing import check_folder, explain, write_atomically
from streamquant.publish.cards.base_card import BaseCard
from streamquant.publish.cards.card_view import HELPERS, make_card_view
from streamquant.publish.cards.markdown_helpers import HUB, whole
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.cards.origin import BASE_CARD, MARK, Origin, card_before, find_origin, is_ours
from streamquant.publish.cards.prompts import PromptFormat, prompt_format
from streamquant.publish.cards.public_report import PublicReport, make_public, refuse_old_report, write_report_files
from streamquant.publish.results import CARD, REPORT_FOLDER, VariantFolder, read_folders
from streamquant.publish.upload.selection import repositories
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.report.text import Markdown, code, markdown

_TAGS = {GGUF: ("gguf", "llama.cpp", "quantized"), SAFETENSORS: ("compressed-tensors", "vllm", "quantized")}
_PLAIN_TAGS = ("bf16", "vllm")
"""Of a checkpoint that is not quantized."""
_LIBRARY = {GGUF: "gguf", SAFETENSORS: "transformers"}
_NOT_OURS = re.compile(r"gguf|awq|gptq|mlx|exl[23]|fp8|fp4|nvfp4|int4|int8|bnb|bitsandbytes|[0-9]-?bit", re.IGNORECASE)
"""Tags of the original that would be said of its weights, which ours are not."""


def write_cards(
    folder: Path,
    options: CardOptions = CardOptions(),
    report: Path | None = None,
) -> list[Path]:
    """Write README.md, and a copy of the report without local paths, into a variant folder or all in an --out folder.

    Returns the cards. Raises UsageError for a README.md that is not ours, StreamquantError for a broken manifest,
    report or base card; nothing is written then.
    """
    folders = read_folders(folder, report)
    repos: Mapping[str, str | None] = {found.path.name: None for found in folders}
    if options.repo is not None:
        repos = repositories(folders, options.repo, is_stem=folders[0].path != folder)
    _check_options(options, [*repos.values()])
    made: dict[int, PublicReport] = {}
    cards = []
    for found in folders:
        _check_card(found, options)
        public = None
        if found.report is not None and any(variant.measurement for variant in found.variants):
            public = made.get(id(found.report)) or make_public(found.report)
            made[id(found.report)] = public
        else:
            refuse_old_report(found.path / REPORT_FOLDER)
        own = replace(options, repo=repos[found.path.name])
        cards.append((found, render_card(found, own, public), public))
    for found, text, public in cards:
        _write(found, text, public)
    return [found.path / CARD for found, _, _ in cards]


def render_card(folder: VariantFolder, options: CardOptions, public: PublicReport | None = None) -> str:
    """The text of README.md, where `options.repo` is ORG/NAME. `public` is the published form of `folder.report`.

    Raises StreamquantError for what cannot be shown, or not be read back.
    """
    origin = find_origin(folder, options.source)
    options = _as_before(folder, options)
    prompts = prompt_format(origin.template) if options.prompts and origin.template is not None else None
    data = front_matter(folder, options, origin.card, prompts)
    body = _body(folder, options, origin, prompts, public)
    text = f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)}---\n{body}"
    _check(text, data, folder.path)
    return text


def front_matter(
    folder: VariantFolder, options: CardOptions, card: BaseCard, prompts: PromptFormat | None
) -> dict[str, Any]:
    """The metadata that the Hub reads; a key without a value is left out."""
    base = options.base_model
    refused = any(variant.made.blocks is not None and variant.made.blocks.is_refused for variant in folder.variants)
    is_plain = folder.container.is_checkpoint and all(v.made.recipe.scheme is None for v in folder.variants)
    tags = _PLAIN_TAGS if is_plain else _TAGS[folder.container]
    if folder.container.is_checkpoint and not is_plain:
        tags = (folder.variants[0].made.recipe.weights.lower(), *tags)
    own = [tag for tag in tags if not (refused and tag == "vllm")] + ["streamquant"]
    own += ["imatrix"] if any(variant.made.imatrix for variant in folder.variants) else []
    own += ["conversational"] if prompts is not None and prompts.prompts else []
    theirs = [tag for tag in card.tags if not _NOT_OURS.search(tag)]
    data = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "license": _one_or_all(card.license),
        "license_name": card.license_name,
        "license_link": _license_link(folder, card, base),
        "language": list(card.language),
        "library_name": _LIBRARY[folder.container],
        "pipeline_tag": card.pipeline_tag or "text-generation",
        "tags": list(dict.fromkeys([*own, *theirs])),
        "quantized_by": options.quantized_by,
    }
    return {key: value for key, value in data.items() if value}


def _as_before(folder: VariantFolder, options: CardOptions) -> CardOptions:
    """The options with what manifest and repository say, and what was said when the card was last written."""
    before = card_before(folder.path)
    org = options.repo.partition("/")[0] if options.repo else None
    base = options.base_model or folder.source.repo or before.base_model
    return replace(options, base_model=base, quantized_by=options.quantized_by or before.quantized_by or org)


def _one_or_all(values: Sequence[str]) -> str | list[str] | None:
    return values[0] if len(values) == 1 else list(values) or None


def _license_link(folder: VariantFolder, card: BaseCard, base: str | None) -> str | None:
    """A link that leads somewhere from our repository; a path in the original's does only if that file came along."""
    link = card.license_link
    if link is None or "://" in link or (folder.path / link).is_file():
        return link
    return f"{HUB}/{base}/blob/main/{link}" if base else None


def _body(
    folder: VariantFolder,
    options: CardOptions,
    origin: Origin,
    prompts: PromptFormat | None,
    public: PublicReport | None,
) -> str:
    environment = Environment(
        loader=PackageLoader("streamquant.publish.cards"),
        undefined=StrictUndefined,
        finalize=markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "md": Markdown, "whole": whole}
    view = make_card_view(folder, options.repo, public)
    template = environment.get_template("fp8.md.j2" if folder.container.is_checkpoint else "gguf.md.j2")
    text = template.render(
        view=view, folder=folder, base=options.base_model, origin=origin, prompts=prompts, public=public,
        **HELPERS,
    )  # fmt: skip
    return f"\n{MARK}\n\n{_tidy(text)}\n"


def _tidy(text: str) -> str:
    """Markdown with single empty lines; fenced blocks stay as they are."""
    lines: list[str] = []
    fence = ""
    for line in text.strip().split("\n"):
        run = re.match(r"`{3,}", line)
        if run is not None and (not fence or line == fence):
            fence = "" if fence else run[0]
        if fence or line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)


def _check(text: str, data: Mapping[str, Any], folder: Path) -> None:
    """What the Hub's own client reads must be what was meant."""
    try:
        found: Any = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call] # the client has no types there
    except Exception as error:  # whatever the client makes of it
        found = {"error": str(error)}
    if found != data:
        raise StreamquantError(
            "the card cannot be read back by huggingface_hub",
            where=str(folder / CARD),
            found=f"{found!r:.300}",
            required=f"{data!r:.300}",
            hint="this is a bug of streamquant",
        )


def _check_options(options: CardOptions, repos: Sequence[str | None]) -> None:
    names = [("--base-model", options.base_model), *(("--repo", repo) for repo in repos)]
    for option, name in names:
        try:
            if name is not None:
                validate_repo_id(name)
                if "/" not in name:
                    raise HFValidationError("ORG/NAME")
        except HFValidationError as error:
            raise UsageError("not the name of a repository", where=option, found=name, required=str(error)) from error
    by = options.quantized_by
    if by is not None and (not by.strip() or not by.isprintable() or len(by) > 100):
        raise UsageError("not a name", where="--quantized-by", found=f"{by!r:.120}", required="a line of text")


def _check_card(folder: VariantFolder, options: CardOptions) -> None:
    """Refuse a README.md that somebody wrote; the one that convert copied from the original is known by its age."""
    card = folder.path / CARD
    if not card.exists() or is_ours(card) or options.force or _is_copy(folder, options.source):
        return
    raise UsageError(
        "README.md is not by streamquant",
        where=str(card),
        hint="move it away, or replace it: streamquant card --force",
    )


def _is_copy(folder: VariantFolder, source: Path | None) -> bool:
    """Whether README.md came along with an FP8 checkpoint: the original's text, or not touched since convert ended."""
    card = folder.path / CARD
    if not folder.container.is_checkpoint or (folder.path / BASE_CARD).exists():
        return False
    if source is not None and (source / CARD).is_file():
        return (source / CARD).read_bytes() == card.read_bytes()
    return card.stat().st_mtime_ns <= (folder.path / MANIFEST).stat().st_mtime_ns


def _write(folder: VariantFolder, text: str, public: PublicReport | None) -> None:
    card, kept = folder.path / CARD, folder.path / BASE_CARD
    if public is not None:
        check_folder(folder.path / REPORT_FOLDER, folder.path)
        write_report_files(public.files, folder.path / REPORT_FOLDER)
    try:
        if folder.container.is_checkpoint and card.exists() and not is_ours(card) and not kept.exists():
            card.replace(kept)
        write_atomically(card, text.encode(errors="replace"))
    except OSError as error:
        raise explain(error, folder.path) from error
