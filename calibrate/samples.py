"""The samples of a calibration: chunks of texts, or the lines of a JSONL file with conversations or texts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamquant.files.strict_json import parse_json
from streamquant.model.corpus import Corpus, read_corpus, read_text, read_tokenizer
from streamquant.quant.errors import StreamquantError, UsageError

Conversation = Mapping[str, Any]
"""A line of a JSONL file: `messages`, and where the model is given tools, `tools`."""
Render = Callable[[Sequence[Conversation]], Sequence[Sequence[int] | StreamquantError]]
"""Conversations -> the tokens of each as the model's chat template has it, or what the template said instead."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Tokens of samples, each a text of its own from position 0."""

    tokens: NDArray[np.int64]
    """int64[samples, context]; what stands behind the tokens of a sample counts for nothing."""
    lengths: NDArray[np.int64]
    """int64[samples]: tokens of each, 1 or more."""
    context: int
    """Tokens that a sample was cut to, at most."""
    texts: tuple[str, ...]
    """Names of the files that they are from."""
    notes: tuple[str, ...] = ()
    """What a user should know of them."""

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    def sha256(self) -> str:
        """Of the tokens that count."""
        found = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for row, length in zip(self.tokens, self.lengths.tolist(), strict=True):
            found.update(row[:length].astype("<i8").tobytes())
        return found.hexdigest()


def samples_of_texts(texts: Sequence[Path], tokenizer: Path, samples: int, context: int) -> Samples:
    """Chunks of `context` tokens of some texts, as many of each; `samples` at most.

    Raises what `read_corpus` raises.
    """
    corpus: Corpus = read_corpus(texts, tokenizer, context, -(-samples // max(1, len(texts))))
    tokens = corpus.tokens[:samples]
    lengths = np.full(len(tokens), context, np.int64)
    notes = (*corpus.notes, *_few(len(tokens), samples))
    return Samples(tokens, lengths, context, tuple(text.name for text in texts), notes)


def samples_of_jsonl(path: Path, tokenizer: Path, samples: int, context: int, render: Render) -> Samples:
    """The first `samples` lines of a JSONL file: objects with `messages`, a conversation that `render` makes tokens of,
    or with `text`. Each is cut to `context` tokens, and samples are as long as they are.

    Raises UsageError for a file without samples, StreamquantError for a line that is neither, or that has no token.
    """
    if samples < 1 or context < 1:
        raise UsageError("nothing to calibrate on", found=f"{samples} samples of {context} tokens")
    lines = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()][:samples]
    if not lines:
        raise UsageError("a file without samples", where=str(path), required="a JSON object in each line")
    found = [_sample(line, f"{path}, line {number}") for number, line in lines]
    chats = iter(render([chat for chat in found if not isinstance(chat, str)]))
    backend = read_tokenizer(tokenizer) if any(isinstance(sample, str) for sample in found) else None
    rows: list[Sequence[int]] = []
    for (number, _), sample in zip(lines, found, strict=True):
        where = f"{path}, line {number}"
        if isinstance(sample, str):
            assert backend is not None
            ids: Sequence[int] | StreamquantError = backend.encode(sample, add_special_tokens=True).ids
        else:
            ids = next(chats)
        if isinstance(ids, StreamquantError):
            raise ids.at(where)
        if not ids:
            raise StreamquantError("a sample without a token", where=where, required="a text of a token or more")
        rows.append(ids[:context])
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return Samples(tokens, lengths, context, (path.name,), _few(len(rows), samples))


def _few(found: int, wanted: int) -> tuple[str, ...]:
    return (f"{found} samples, of {wanted} that were asked for: there are no more",) if found < wanted else ()


def _sample(line: str, where: str) -> str | Conversation:
    """A text, or a conversation."""
    value = parse_json(line.encode(), where, hint="each line is one JSON object")
    match value:
        case {"messages": [*messages]} if messages and all(isinstance(message, dict) for message in messages):
            tools = value.get("tools") or []
            if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
                return {"messages": messages, "tools": tools}
        case {"text": str(text)}:
            return text
    raise StreamquantError(
        "a line is no sample",
        where=where,
        found=f"{sorted(value) if isinstance(value, dict) else value!r:.200}",
        required="an object with `messages`, a list of messages with role and content, or with `text`",
    )
