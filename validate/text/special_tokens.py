"""The special tokens of llama.cpp with a GGUF file against the original's: BOS, EOS, and where answers end.

A key that a file leaves out has a default in llama.cpp, and nothing shows it: with EOS left out, every answer of a
byte-level vocabulary ends at the first comma (id 11).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from gguf import TokenType

from streamquant.convert.metadata.vocabulary_defaults import EngineTokens, engine_tokens, stop_ids
from streamquant.convert.metadata.vocabulary_files import read_json
from streamquant.files.gguf_file import GgufKeys, read_header
from streamquant.validate.engines.engine import EngineFacts

_WORDS = frozenset({int(TokenType.NORMAL), int(TokenType.BYTE)})


def check_special_tokens(
    path: Path, variant: EngineFacts, folder: Path, original: EngineFacts, special: Iterable[tuple[int, str, bool]]
) -> tuple[str, ...]:
    """A line for each special token of llama.cpp that is another than the original's.

    path     the GGUF file, of which `variant` is what llama.cpp says
    folder   the original, of which `original` is what transformers says
    special  (id, text, flagged special) of the original's added tokens: EngineProcess.special_tokens

    Raises StreamquantError if the file is broken, or config.json or generation_config.json of the original.
    """
    metadata = read_header(path).metadata
    types = GgufKeys(path, metadata).wholes("tokenizer.ggml.token_type")
    model, generation = (read_json(folder / name) for name in ("config.json", "generation_config.json"))
    ends = stop_ids(model, generation, folder)
    found = _bos(variant, original), _eos(engine_tokens(metadata).eos, types, (variant, original), ends)
    return tuple(chain(*found, _stops(engine_tokens(metadata), original, ends, special)))


def _bos(variant: EngineFacts, original: EngineFacts) -> Iterator[str]:
    if original.bos is not None and variant.bos != original.bos:
        yield f"BOS: llama.cpp has {variant.bos!r}, the original {original.bos!r}"
    if variant.adds_bos != original.adds_bos:
        does, does_not = ("llama.cpp", "the original") if variant.adds_bos else ("the original", "llama.cpp")
        yield f"BOS before a text: {does} adds it, {does_not} does not"


def _eos(
    found: int | None, types: Sequence[int], facts: tuple[EngineFacts, EngineFacts], ends: Sequence[int]
) -> Iterator[str]:
    """EOS is one of the tokens at which the original ends; where it has none, no word may be one in llama.cpp."""
    variant, original = facts
    if found is None or found in ends or variant.eos is None or variant.eos == original.eos:
        return
    known = [repr(original.eos)] if original.eos is not None else []
    known += [str(number) for number in ends]
    if known or (found < len(types) and types[found] in _WORDS):
        yield f"EOS: llama.cpp has {variant.eos!r} ({found}), the original {', '.join(known) or 'none'}"


def _stops(
    found: EngineTokens, original: EngineFacts, ends: Sequence[int], special: Iterable[tuple[int, str, bool]]
) -> Iterator[str]:
    """Added tokens at which the original ends an answer, and llama.cpp does not."""
    texts = {number: text for number, text, _ in special}
    wanted = {number for number in ends if number in texts}
    wanted |= {number for number, text in texts.items() if text == original.eos}
    missed = sorted(wanted - found.stops)
    if missed:
        names = ", ".join(f"{texts[number]!r} ({number})" for number in missed)
        yield f"end of an answer: the original ends at {names}, llama.cpp goes on"
