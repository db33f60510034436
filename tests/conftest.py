"""What all tests share: test data, the reference programs, a real model, and its conversions; made once in a run.

What takes seconds to make is kept on a shelf, a folder that the workers of pytest-xdist share: the first that needs a
thing makes it under a lock, the others take it.
"""

import fcntl
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from examples.smollm2_checkpoint import FOLDER, write_smollm2
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests import gguf_peer, llama_cpp, synthetic
from tests.smollm2 import MISSING, PACKAGE, find_gguf

LONG_SECONDS = 1800
"""After which a long test counts as hanging: what takes 200 s alone took 600 s on a machine that did other things."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests without a limit of their own that of LONG_SECONDS."""
    for item in items:
        if item.get_closest_marker("long") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@dataclass(frozen=True, slots=True)
class Shelf:
    """A folder of things that take long to make."""

    folder: Path

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `make(folder)` if no test of this run did so before. Must not be written to."""
        place = self.folder / re.sub(r"[^\w.-]", "_", name)
        with (self.folder / f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.folder / f"{place.name}.done"
            if not done.exists():
                place.mkdir(exist_ok=True)
                make(place)
                done.touch()
        return place


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The shelf of this test run, one for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shelf"
    folder.mkdir(exist_ok=True)
    return Shelf(folder)


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared test data."""
    folder = gguf_peer.data_folder()
    if folder is None:
        pytest.skip("no shared test data: set STREAMQUANT_DATA, or put it beside the repository, ../shared/data")
    return folder


@pytest.fixture(scope="session")
def peers() -> Path:
    """The folder of the reference programs that are installed outside the environment."""
    folder = gguf_peer.converter_folder()
    if folder is None:
        pytest.skip("llama.cpp's converter is not installed: make setup, or set STREAMQUANT_PEERS")
    return folder.parent


@pytest.fixture(scope="session")
def smollm2(shelf: Shelf) -> Path:
    """SmolLM2-135M-Instruct as a sharded BF16 checkpoint."""
    if find_gguf() is None:
        pytest.skip(MISSING)
    return shelf.get("smollm2-source", lambda folder: write_smollm2(PACKAGE, folder / FOLDER)) / FOLDER


@pytest.fixture(scope="session")
def smollm2_variants(shelf: Shelf, smollm2: Path) -> Path:
    """The --out folder of one conversion of SmolLM2 into every variant of PLAIN_SMOLLM2."""
    variants = parse_variants(PLAIN_SMOLLM2)
    return shelf.get(
        "smollm2-variants",
        lambda folder: convert(make_plan(open_checkpoint(smollm2), variants), folder, RunOptions(jobs=2)),
    )


@pytest.fixture(scope="session")
def llama_quantize() -> None:
    """Builds llama.cpp's own programs where they are not built yet, or skips."""
    try:
        llama_cpp.build()
    except llama_cpp.CannotBuildError as error:
        pytest.skip(str(error))


PLAIN = [spec for spec, recipe in RECIPES.items() if not (recipe.needs_importance or recipe.needs_calibration)]
"""Every variant that is made without an importance matrix."""
PLAIN_SMOLLM2 = [spec for spec in PLAIN if spec not in ("w8a16", "w4a16", "w4a16-asym")]
"""Those of SmolLM2, whose rows of 576 weights are no whole groups of 128."""
TINY_PRE = "llama-bpe"
"""tokenizer.ggml.pre of `tiny`, which cannot be told from its tokenizer."""


@pytest.fixture(scope="session")
def tiny(shelf: Shelf) -> Path:
    """A synthetic Llama 3.1 in two BF16 shards, untied, with a tokenizer of 260 tokens. Needs no test data."""

    def make(folder: Path) -> None:
        tokenizer = write_small_tokenizer(folder / "tokenizer")
        synthetic.write_checkpoint(
            folder / "Tiny", size="small", shards=2, rope="llama3", tokenizer=tokenizer, pth=True
        )

    return shelf.get("tiny", make) / "Tiny"


@pytest.fixture(scope="session")
def tiny_variants(shelf: Shelf, tiny: Path) -> Path:
    """The --out folder of one conversion of `tiny` into every variant that needs no importance matrix."""
    variants, options = parse_variants(PLAIN), ConversionOptions(pre=TINY_PRE)
    return shelf.get(
        "tiny-variants",
        lambda folder: convert(make_plan(open_checkpoint(tiny), variants, options), folder, RunOptions(jobs=2)),
    )


def write_small_tokenizer(folder: Path, *, special: Sequence[str] = (), **more: object) -> Path:
    """A byte-level BPE tokenizer with three merges: as small as one can be, unknown to every table.

    `special` are further special tokens; `more` are keys of tokenizer_config.json. (With add_bos_token=True llama.cpp's
    converter writes what we write.)
    """
    merges = [("t", "h"), ("th", "e"), ("i", "n")]
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    split = pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>", *special)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template, **more}))
    return folder


Tensor = tuple[str, tuple[int, ...], bytes]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file: dtype, shape, bytes. A reader of its own."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = memoryview(content)[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(data[slice(*entry["data_offsets"])]))
        for name, entry in header.items()
    }


@pytest.fixture
def interrupt_after() -> Iterator[Callable[[float], None]]:
    """Press Ctrl-C in so many seconds. SIGINT raises KeyboardInterrupt, also where the shell started the tests in the
    background with SIGINT ignored; it is sent to the process, as signal.raise_signal would not wake its main thread.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda seconds: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)
