"""What is fuzzed: functions of bytes that read a file. StreamquantError is an answer, anything else is a fault.

The corpus, tests/corpus/TARGET/*, holds small files that the program or the tests made, and what fuzzing found.
"""

import contextlib
import json
import resource
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from huggingface_hub import set_client_factory

from streamquant.convert.architectures import ARCHITECTURES, describe
from streamquant.convert.manifest import MANIFEST, read_manifest
from streamquant.convert.metadata.guard_template import guard_template
from streamquant.convert.metadata.vocabulary import read_vocabulary
from streamquant.convert.recipes.imatrix import read_imatrix
from streamquant.convert.recipes.recipe_file import read_recipe
from streamquant.convert.run.journal import JOURNAL, WORK_FOLDER, Journal
from streamquant.convert.source.weights import Place, read_weight_map
from streamquant.files.gguf_file import read_header as read_gguf
from streamquant.files.safetensors_file import read_header as read_safetensors
from streamquant.files.strict_json import parse_json, read_json_object
from streamquant.hub import client
from streamquant.hub.http_library import httpx
from streamquant.hub.repo import open_repo
from streamquant.model.variants.gguf_model import read_model
from streamquant.publish.cards.base_card import read_base_card
from streamquant.publish.release.release_file import read_release
from streamquant.publish.release.release_state import ReleaseState
from streamquant.publish.upload.delivery import UPLOADS, UploadRecord
from streamquant.quant.errors import StreamquantError
from streamquant.validate.engines import hugging_face
from streamquant.validate.report.data import REPORT, read_report

CORPUS = Path(__file__).parents[1] / "corpus"
Target = Callable[[bytes], object]
LONGEST_MESSAGE = 20_000
"""Bytes."""
VOCABULARY = 520
"""Rows of the embedding that the tokenizers belong to."""


@cache
def _folder() -> Path:
    """One folder for all inputs of this process, which takes it away."""
    kept = tempfile.TemporaryDirectory(prefix="streamquant-fuzz-")
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def gguf_header(data: bytes) -> None:
    """A GGUF file, and the model that its keys describe."""
    path = _file("fuzz.gguf", data)
    header = read_gguf(path)
    read_model(path, header.metadata, {tensor.name: tensor for tensor in header.tensors})


def index(data: bytes) -> None:
    """model.safetensors.index.json."""
    path = _file("index.json", data)
    read_weight_map(Place("fuzz", {path.name}, lambda _: read_json_object(path)))


def config(data: bytes) -> None:
    """config.json."""
    describe(parse_json(data, "config.json"))


def _vocabulary(family: str, files: Mapping[str, bytes], pre: str | None = "llama-bpe") -> None:
    folder = _folder() / family
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read_vocabulary(folder, ARCHITECTURES[family].llama_cpp.vocabulary, vocab_size=VOCABULARY, pre=pre)


def tokenizer(data: bytes) -> None:
    """tokenizer.json."""
    _vocabulary("Qwen2ForCausalLM", {"tokenizer.json": data, "tokenizer_config.json": b"{}"})


def tokenizer_config(data: bytes) -> None:
    """tokenizer_config.json."""
    beside = (CORPUS / "tokenizer" / "bpe.json").read_bytes()
    _vocabulary("Qwen2ForCausalLM", {"tokenizer.json": beside, "tokenizer_config.json": data})


def sentencepiece(data: bytes) -> None:
    """tokenizer.model."""
    _vocabulary("LlamaForCausalLM", {"tokenizer.model": data, "tokenizer_config.json": b"{}"}, None)


def template(data: bytes) -> None:
    """A chat template, which is changed without being run."""
    with contextlib.suppress(UnicodeDecodeError):
        guard_template(data.decode(), "<s>")


def journal(data: bytes) -> None:
    """The journal of an unfinished run."""
    folder = _folder() / "run"
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / WORK_FOLDER / JOURNAL).write_bytes(data)
    with contextlib.closing(Journal(folder)) as found:
        found.head()


def manifest(data: bytes) -> None:
    """streamquant.json."""
    read_manifest(_file(MANIFEST, data).parent)


def hub_answer(data: bytes) -> None:
    """What the Hub answers to the first question: the repository, its commit and its files.

    An answer that is no JSON is asked for again, with waits, which the tests of the client see to.
    """
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return
    _HUB.append(data)
    _answering_client()
    open_repo("ORG/NAME")


_HUB: deque[bytes] = deque(maxlen=1)


@cache
def _answering_client() -> None:
    """Make the Hub's client get the last of _HUB for every request, without a network."""

    def body(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=_HUB[-1], headers={"Content-Type": "application/json"}, request=request)

    client.set_up_client()
    set_client_factory(lambda: client._Client(transport=httpx.MockTransport(body), timeout=None))


def uploads(data: bytes) -> None:
    """The record of what a conversion has pushed, which a crash may have torn: a line that is added is a whole line."""
    folder = _folder() / "pushed"
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    path = folder / WORK_FOLDER / UPLOADS
    path.write_bytes(data)
    with contextlib.closing(UploadRecord(folder)) as record:
        record.add("ORG/NAME", "c" * 40, "model.safetensors", 1, "0" * 64)
    last = path.read_bytes().removesuffix(b"\n").rpartition(b"\n")[2]
    assert json.loads(last)["path"] == "model.safetensors"


def rendering(data: bytes) -> None:
    """A chat template, rendered in Jinja's sandbox under the bounds that the engine's process has, but smaller."""
    _render("")  # imports take longer than the bounds allow
    with contextlib.suppress(UnicodeDecodeError, TimeoutError), _bounds():
        result = _render(data.decode())
        assert result["error"] is None or isinstance(result["error"], str)


def _render(template: str) -> dict[str, object]:
    request = {"messages": MESSAGES, "tools": [], "add_generation_prompt": True, "variables": {}}
    (result,) = hugging_face._render(template, [request], {"bos_token": "<s>", "eos_token": "</s>"})
    return result


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    """A third of a second of computing, and 512 MiB: a template that takes more fails, as any may."""

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (512 << 20), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


TARGETS: Mapping[str, Target] = {
    "gguf": gguf_header,
    "safetensors": lambda data: read_safetensors(_file("fuzz.safetensors", data)),
    "index": index,
    "config": config,
    "tokenizer": tokenizer,
    "tokenizer_config": tokenizer_config,
    "sentencepiece": sentencepiece,
    "template": template,
    "recipe": lambda data: read_recipe(_file("recipe.yaml", data)),
    "release": lambda data: read_release(_file("release.yaml", data)),
    "card": lambda data: read_base_card(_file("README.md", data)),
    "imatrix": lambda data: read_imatrix(_file("fuzz.imatrix", data)),
    "journal": journal,
    "manifest": manifest,
    "report": lambda data: read_report(_file(REPORT, data)),
    "release_state": lambda data: ReleaseState(_file("state.json", data)),
    "hub_answer": hub_answer,
    "uploads": uploads,
    "rendering": rendering,
}
"""Names of targets, which are folders of the corpus."""


def answer(name: str, data: bytes) -> StreamquantError | None:
    """Run a target. Returns its refusal, which must be short, or None; anything else that it raises is a fault."""
    try:
        TARGETS[name](data)
    except StreamquantError as error:
        if len(message := str(error).encode()) > LONGEST_MESSAGE:
            raise AssertionError(f"{name}: a message of {len(message):,} bytes") from error
        return error
    return None
