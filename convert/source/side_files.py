"""The files of a checkpoint that are no weights: which of them belong to the model, and that they are its own.

They are chosen by name, from what transformers, vLLM, SGLang, llama.cpp's converter and sentence-transformers read, and
what a person needs (card, licence). What tools leave behind (trainer_state.json, adapter_config.json, imatrix.dat) does
not come along: with adapter_config.json beside a model, transformers loads the adapter's base in its place.

What comes along is published, so it has to be the model's: a link that leads out of the folder could lead to anything.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from streamquant.convert.source.model_folder import CLIENT, repository_of
from streamquant.files.folders import cache_folder
from streamquant.quant.errors import StreamquantError

MAX_SIDE_FILE = 128 * 1024 * 1024
"""Bytes of the largest file that comes along; the largest tokenizers are about 35 MB."""
SIDE_FOLDERS = re.compile(r"additional_chat_templates|[0-9]+_[A-Za-z]+")
"""Folders of a checkpoint in which side files lie: named chat templates, the modules of sentence-transformers."""
SNAPSHOTS = "snapshots"
"""Where model folders with links into the Hub client's cache are kept, below the user's cache (snapshot.py)."""

_NAMES = frozenset(
    {
        *("generation_config.json", "README.md", "SYSTEM_PROMPT.txt"),
        # tokenizers, of transformers' classes and of mistral-common
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
        "tiktoken.model",
        *("vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "normalizer.json"),
        *("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
        *("chat_template.jinja", "chat_template.json"),
        *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
        *("video_preprocessor_config.json", "feature_extractor_config.json"),
        # sentence-transformers: what is done with the hidden states
        *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    }
)
_PATTERNS = re.compile(
    r"tokenizer\.model\.v[0-9]+(?:m[0-9]+)?"  # Mistral's versions of its tokenizer
    r"|[\w-]+\.tiktoken"
    r"|additional_chat_templates/[^/\\]+\.jinja"
    r"|[0-9]+_[A-Za-z]+/config\.json"  # 1_Pooling/config.json
    # the code of a checkpoint, for runtimes that are told to trust it; nothing here runs it
    r"|(?:configuration|modeling|modular|tokenization|processing|image_processing|feature_extraction|generation)_\w+\.py",
    re.ASCII,
)
_TERMS = re.compile(
    r"(?!.*key)[\w .-]*(?:licen[cs]e|notice|use[ _-]?policy|copying|copyright|citation|terms)[\w -]*"
    r"(?:\.(?:txt|md|rst|html|pdf|cff|bib|[0-9]+))*",
    re.IGNORECASE,
)
"""LICENSE, LICENSE-2.0.txt, Notice.txt, USE_POLICY.md, "Model LICENSE AGREEMENT.pdf"."""


def is_side_file(path: str, size: int) -> bool:
    """Whether a file belongs to a checkpoint and holds no weights, by its path in the folder and its size in bytes.

    config.json and the index are not among them: they are written anew.

    >>> [is_side_file(name, 100) for name in ("tokenizer.json", "LICENSE", "Notice.txt", "1_Pooling/config.json")]
    [True, True, True, True]
    >>> [is_side_file(name, 100) for name in ("adapter_config.json", "trainer_state.json", "imatrix.dat", "notes.txt")]
    [False, False, False, False]
    """
    if size > MAX_SIDE_FILE or path.startswith(".") or not path.isprintable():
        return False
    return path in _NAMES or any(pattern.fullmatch(path) for pattern in (_PATTERNS, _TERMS))


def check_own(folder: Path, names: Iterable[str]) -> None:
    """Raise StreamquantError unless the files are in the folder, or blobs of its repository in the Hub client's cache.

    A shard may be a link to elsewhere: what it holds are weights of the shapes of this model, or it is refused.
    """
    for name in names:
        path = folder / name
        if not is_own(folder, path):
            raise StreamquantError(
                "a file of the checkpoint is a link that leads out of its folder",
                where=str(path),
                found=f"a link to {os.path.realpath(path)}",
                required="a file of the folder: it would be published with the model",
                hint="copy the file into the folder in place of the link, or convert the folder that it lies in",
            )


def is_own(folder: Path, path: Path) -> bool:
    """Whether a path, links followed, is in the folder or in the blobs of its repository."""
    folder, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real.is_relative_to(folder):
        return True
    repository = real.parent.parent
    return real.parent.name == "blobs" and (
        repository_of(folder) == repository or _of_ours(folder) == repository.name.removeprefix(CLIENT)
    )


def _of_ours(folder: Path) -> str | None:
    """ORG--NAME of a snapshot in our cache, SNAPSHOTS/ORG--NAME/COMMIT/NAME; its links lead into the client's."""
    with_snapshots = Path(os.path.realpath(cache_folder() / SNAPSHOTS))
    return folder.parent.parent.name if folder.parent.parent.parent == with_snapshots else None


def read_side_file(folder: Path, name: str) -> bytes:
    """The bytes of a side file. Raises StreamquantError as `check_own`, and for what cannot be read or is no file."""
    check_own(folder, (name,))
    path = folder / name
    try:
        # A link that takes the place of what was checked is not followed, and a FIFO is not waited for.
        descriptor = os.open(os.path.realpath(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StreamquantError("not a regular file", where=str(path))
            return file.read()
    except OSError as error:
        raise StreamquantError("cannot read a file", where=str(path), found=error.strerror) from error
