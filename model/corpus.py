"""Texts -> chunks of tokens, cut as llama-perplexity and llama-imatrix cut them.

Each text is tokenized once: BOS first if the tokenizer adds one, special tokens in the text taken as plain text, or as
what they are (llama-imatrix's --parse-special). It is
cut into chunks of `context` tokens, the rest at the end is dropped, and the first token of each chunk is replaced by
BOS if the tokenizer adds one (tools/perplexity/perplexity.cpp of llama.cpp; its -f drops one newline at the end).
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from streamquant.convert.metadata.tiktoken import FILE as TIKTOKEN
from streamquant.convert.metadata.tiktoken import tiktoken_backend
from streamquant.quant.errors import StreamquantError, UsageError


@dataclass(frozen=True, slots=True)
class TextFile:
    """One text of a corpus, a category of its own: path, SHA-256 of its bytes, tokens in it, chunks used."""

    path: Path
    sha256: str
    tokens: int
    chunks: int

    @property
    def category(self) -> str:
        """The name of the file without its suffix."""
        return self.path.stem


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Chunks of tokens and where they come from."""

    tokens: NDArray[np.int64]
    """int64[chunks, context], all chunks of the first text, then of the second ..."""
    files: tuple[TextFile, ...]
    bos: int | None
    """The token at the beginning of every chunk, None where the tokenizer adds none."""
    plain: Mapping[str, int] = field(default_factory=dict)
    """Special tokens that stand in the texts and were taken as plain text: how often."""

    @property
    def context(self) -> int:
        """Tokens in a chunk."""
        return int(self.tokens.shape[1])

    @property
    def categories(self) -> dict[str, NDArray[np.int64]]:
        """Category -> int64, the numbers of its chunks."""
        ends = np.cumsum([file.chunks for file in self.files])
        return {file.category: np.arange(end - file.chunks, end) for file, end in zip(self.files, ends, strict=True)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the texts."""
        if not self.plain:
            return ()
        text = max(self.plain, key=lambda text: self.plain[text])
        return (
            f"{text} stands {self.plain[text]} times in the texts and is read as letters, not as the token: "
            "--parse-special reads it as the chats of users have it",
        )

    def sha256(self) -> str:
        """Of the tokens and their shape."""
        return hashlib.sha256(f"{self.tokens.shape}".encode() + self.tokens.astype("<i8").tobytes()).hexdigest()


def read_corpus(
    texts: Sequence[Path],
    tokenizer: Path,
    context: int = 512,
    chunks: int | None = None,
    *,
    parse_special: bool = False,
) -> Corpus:
    """Tokenize and cut texts (UTF-8); at most `chunks` chunks of each.

    parse_special: special tokens in the texts are tokens, as with llama-imatrix's option of that name.
    tokenizer is a tokenizer.json or a folder with one. Raises UsageError for a bad argument or a text of less than two
    chunks (llama-perplexity refuses it too), StreamquantError for a file that cannot be read.
    """
    if context < 2 or (chunks is not None and chunks < 1) or not texts:
        raise UsageError("nothing to score", found=f"context {context}, chunks {chunks}, {len(texts)} texts")
    if len({text.stem for text in texts}) < len(texts):
        raise UsageError("two texts of one name", required="names that differ, they are the categories")
    backend = read_tokenizer(tokenizer)
    bos = added_bos(backend)
    specials = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    plain: Counter[str] = Counter()
    cut, files = [], []
    for text in texts:
        content = read_text(text)
        ids = encode_text(backend, content.removesuffix("\n"), parse_special=parse_special)
        if not parse_special:
            plain.update({text: count for text in specials if (count := content.count(text))})
        ids = ids if bos is None else [bos, *ids]
        if len(ids) < 2 * context:
            raise UsageError(
                "a text is too short",
                where=str(text),
                found=f"{len(ids)} tokens",
                required=f"{2 * context}: two chunks of {context}",
                hint="give a longer text, or a smaller --context",
            )
        count = min(len(ids) // context, chunks or len(ids))
        cut.append(np.array(ids[: count * context], np.int64).reshape(count, context))
        digest = hashlib.sha256(text.read_bytes()).hexdigest()
        files.append(TextFile(text, digest, len(ids), count))
    tokens = np.concatenate(cut)
    if bos is not None:
        tokens[:, 0] = bos
    return Corpus(tokens, tuple(files), bos, dict(plain))


def read_text(path: Path) -> str:
    """A UTF-8 text. Raises StreamquantError if it cannot be read or is not UTF-8, with the offset."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise StreamquantError("cannot read a text", where=str(path), found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise StreamquantError(
            "a text is not UTF-8", where=f"{path}, byte {error.start}", found=error.reason, required="UTF-8"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder with one, or with a tiktoken.model."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file() and (path / TIKTOKEN).is_file():
        return tiktoken_backend(path)
    if not file.is_file():
        raise UsageError(
            "no tokenizer",
            where=str(file),
            required="tokenizer.json",
            hint="name the folder of the original checkpoint",
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class
        raise StreamquantError("cannot read a tokenizer", where=str(file), found=str(error)[:300]) from error


def encode_text(backend: Tokenizer, text: str, *, parse_special: bool = False) -> list[int]:
    """Token ids without BOS. Special tokens in the text are plain text without `parse_special`, as in llama.cpp."""
    before = backend.encode_special_tokens
    backend.encode_special_tokens = not parse_special
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    finally:
        backend.encode_special_tokens = before


def added_bos(backend: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every text, None where it adds none."""
    with_special = backend.encode("a", add_special_tokens=True).ids
    plain = backend.encode("a", add_special_tokens=False).ids
    if len(with_special) > len(plain) and with_special[1 : 1 + len(plain)] == plain:
        return int(with_special[0])
    return None
