"""What a card needs to know of the original and the variants do not say: its card, sampling defaults, chat template."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.convert.manifest import MANIFEST, read_manifest
from streamquant.convert.source.side_files import is_own
from streamquant.files.folders import real_path
from streamquant.files.gguf_file import GgufKeys, read_header
from streamquant.files.reading import open_regular
from streamquant.files.strict_json import read_json_object
from streamquant.publish.cards.base_card import BaseCard, base_card, read_base_card
from streamquant.publish.results import CARD, VariantFolder
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.validate.text.chat import read_template

BASE_CARD = "README.base.md"
"""The original's card in an FP8 folder, once ours has taken its place."""
MARK = "<!-- model card by streamquant: written anew by `streamquant card` -->"
"""In every card of ours: a README.md without it is never overwritten."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Of generation_config.json."""
_GGUF_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_HEAD = 256 * 1024


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template and where it stands: a GGUF file, or a folder with a tokenizer."""

    path: Path
    text: str
    special: Mapping[str, str] | None
    """bos_token and eos_token of a GGUF; None: the folder's tokenizer knows."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What was found; each part comes from the first place that has it."""

    card: BaseCard
    sampling: Mapping[str, float | int]
    template: Template | None


def find_origin(folder: VariantFolder, source: Path | None) -> Origin:
    """Look in the original (`source`, if given), in the variant folder, and in folders beside it of the same source.

    Raises StreamquantError for a broken file.
    """
    if source is not None and not source.is_dir():
        raise UsageError("no such folder", where=str(source), required="--source with the folder of the original")
    own = [folder.path] if folder.container.is_checkpoint else []
    folders = [*([source] if source is not None else []), *own, *_beside(folder)]
    gguf = next(_ggufs(folder), None)
    metadata: Mapping[str, Any] = {} if gguf is None else read_header(gguf).metadata
    card = next((read_base_card(path) for path in map(base_card_of, folders) if path is not None), None)
    return Origin(
        # where the files are gone after their upload, the card before still knows
        card=card or (card_before(folder.path) if gguf is None else _card_of_gguf(metadata)),
        sampling=_sampling(folders, metadata),
        # the published file's own template is the one that users get
        template=(None if gguf is None else _template_of_gguf(gguf, metadata)) or _template(own + folders),
    )


def base_card_of(folder: Path) -> Path | None:
    """The original's card in a folder: kept under another name, or in place."""
    kept, card = folder / BASE_CARD, folder / CARD
    if kept.is_file() and is_own(folder, kept):
        return kept
    return card if card.is_file() and is_own(folder, card) and not is_ours(card) else None


def card_before(folder: Path) -> BaseCard:
    """What our own card in a folder says; an empty record where there is none, or somebody broke it."""
    if is_ours(folder / CARD):
        with contextlib.suppress(StreamquantError):
            return read_base_card(folder / CARD)
    return BaseCard()


def is_ours(card: Path) -> bool:
    """Whether a README.md was written by us."""
    try:
        with open_regular(card) as file:
            head = file.read(_HEAD)
    except (OSError, StreamquantError):
        return False
    return MARK.encode() in head.split(b"\n")


def _beside(folder: VariantFolder) -> Iterator[Path]:
    """Checkpoint folders in the same --out folder that were made of the same source."""
    for path in sorted(real_path(folder.path).parent.glob(f"*/{MANIFEST}")):
        place = path.parent
        if place != real_path(folder.path) and (place / "config.json").is_file():
            manifest = read_manifest(place)
            if manifest is not None and manifest.source == folder.source:
                yield place


def _ggufs(folder: VariantFolder) -> Iterator[Path]:
    """The first files of GGUF variants that are still on the disk, smallest first."""
    if not folder.container.is_checkpoint:
        for variant in reversed(folder.variants):
            path = folder.path / variant.files[0].path
            if path.is_file():
                yield path


def _card_of_gguf(metadata: Mapping[str, Any]) -> BaseCard:
    """What llama.cpp's converter takes over from the original's card."""
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    keys |= {"language": "languages", "tags": "tags"}
    return base_card({name: metadata.get(f"general.{key}") for name, key in keys.items()})


def _sampling(folders: list[Path], metadata: Mapping[str, Any]) -> dict[str, float | int]:
    found: Mapping[str, Any] = {name: metadata.get(key) for name, key in _GGUF_SAMPLING.items()}
    for folder in folders:
        if not any(_is_number(found.get(name)) for name in SAMPLING):
            path = folder / "generation_config.json"
            found = read_json_object(path) if path.is_file() else found
    return {name: _short(found[name]) for name in SAMPLING if _is_number(found.get(name))}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def _short(value: float) -> float | int:
    """A number as people write it: a GGUF holds 0.6 in 32 bits.

    >>> _short(0.6000000238418579), _short(20)
    (0.6, 20)
    """
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _template_of_gguf(path: Path, metadata: Mapping[str, Any]) -> Template | None:
    keys = GgufKeys(path, metadata)
    text, tokens = keys.text("tokenizer.chat_template"), keys.texts("tokenizer.ggml.tokens")
    special = {}
    for name in ("bos", "eos"):
        number = keys.whole(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= number < len(tokens):
            special[f"{name}_token"] = tokens[number]
    return Template(path, text, special) if text is not None else None


def _template(folders: list[Path]) -> Template | None:
    for folder in folders:
        text = read_template(folder)
        if text is not None:
            return Template(folder, text, None)
    return None
