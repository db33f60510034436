"""Headers, indexes and JSON from a stranger: one message that says what and where, or success; never anything else."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.convert.source.weights import INDEX, SINGLE_FILE
from streamquant.files.safetensors_file import DTYPE_BITS, MAX_HEADER, read_header, write_header
from streamquant.files.strict_json import parse_json, read_json, read_json_object
from streamquant.quant.errors import StreamquantError, UsageError
from tests.attacks.harness import edit_json, pack, rewrite, shards_of, unpack, untouched, write_model


def header_of(*tensors: tuple[str, list[int]], **changes: Any) -> dict[str, Any]:
    """F32 tensors one after another; changes replace keys of the last one."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in tensors:
        size = 4
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header[tensors[-1][0]].update(changes)
    return header


AB = (("a", [2, 3]), ("b", [4]))
DATA = bytes(24 + 16)
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # The length
    "empty file": (b"", ("not a safetensors file", "0 bytes")),
    "seven bytes": (bytes(7), ("not a safetensors file", "7 bytes")),
    "length of zero": (bytes(8), ("broken JSON",)),
    "length 2^63": (pack(b"{}", length=1 << 63), ("header too large", "9,223,372,036,854,775,808")),
    "length 2^64-1": (pack(b"{}", length=(1 << 64) - 1), ("header too large", "18,446,744,073,709,551,615")),
    "length above the limit": (pack(b"{}", length=MAX_HEADER + 1), ("header too large", f"{MAX_HEADER:,}")),
    "length at the limit": (pack(b"{}", length=MAX_HEADER), ("truncated", "10 bytes", f"{MAX_HEADER + 8:,}")),
    "length one too long": (pack(b"{}", length=3), ("truncated", "10 bytes", "11 bytes")),
    "length one too short": (pack(b'{"a":1}', length=6), ("broken JSON",)),
    # The JSON
    "a list": (pack([]), ("not a JSON object", "list")),
    "a string": (pack("{}"), ("not a JSON object", "str")),
    "null": (pack(None), ("not a JSON object", "NoneType")),
    "not JSON": (pack(b"PK\x03\x04 a zip file"), ("broken JSON",)),
    "not UTF-8": (pack(b'{"\xff":{}}'), ("not UTF-8",)),
    "UTF-16": (pack('{"a":{}}'.encode("utf-16")), ("not UTF-8",)),
    "nested": (pack(DEEP), ("nested too deeply",)),
    "NaN": (pack(b'{"a":NaN}'), ("broken JSON", "NaN")),
    "Infinity": (pack(b'{"a":-Infinity}'), ("broken JSON", "-Infinity")),
    "number of 5000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), ("broken JSON",)),
    "two objects": (pack(b"{}{}"), ("broken JSON",)),
    "a key twice": (
        pack(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        ("broken JSON", "duplicate key 'a'"),
    ),
    "a key twice inside": (
        pack(b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', b"x"),
        ("broken JSON", "duplicate key 'dtype'"),
    ),
    # The entries
    "an entry of no object": (pack({"a": [1, 2]}), ("broken header", "'a'", "list")),
    "an entry without a dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), ("broken header", "dtype")),
    "an entry with more": (pack(header_of(*AB, extra=1), DATA), ("broken header", "'b'", "extra")),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), ("__metadata__", "an object of strings")),
    "metadata of no object": (pack({"__metadata__": ["a"]}), ("__metadata__", "an object of strings")),
    "metadata of null": (pack({"__metadata__": None}), ("__metadata__", "an object of strings")),
    # dtype
    "unknown dtype": (pack(header_of(*AB, dtype="F31"), DATA), ("unknown dtype", "'b'", "F31", "BF16")),
    "dtype of no string": (pack(header_of(*AB, dtype=["F32"]), DATA), ("unknown dtype", "'b'")),
    "dtype in lower case": (pack(header_of(*AB, dtype="f32"), DATA), ("unknown dtype", "f32")),
    "half a byte": (pack(header_of(*AB, dtype="F4", shape=[33]), DATA), ("do not fit shape and dtype", "16.5")),
    # shape
    "negative dimension": (pack(header_of(*AB, shape=[-4]), DATA), ("broken shape", "'b'", "-4")),
    "two negative dimensions": (pack(header_of(*AB, shape=[-2, -2]), DATA), ("broken shape", "-2")),
    "boolean dimension": (pack(header_of(*AB, shape=[4, True]), DATA), ("broken shape", "True")),
    "float dimension": (pack(header_of(*AB, shape=[4.0]), DATA), ("broken shape", "4.0")),
    "string dimension": (pack(header_of(*AB, shape=["4"]), DATA), ("broken shape",)),
    "shape of no list": (pack(header_of(*AB, shape=4), DATA), ("broken shape",)),
    "shape of infinity": (pack(header_of(*AB, shape=[1e999]), DATA), ("broken JSON",)),
    "huge dimension": (pack(header_of(*AB, shape=[1 << 64]), DATA), ("broken shape",)),
    "huge product": (pack(header_of(*AB, shape=[1 << 62, 4]), DATA), ("do not fit shape and dtype",)),
    "product that wraps to the right size": (
        pack(header_of(*AB, shape=[(1 << 62) + 4]), DATA),
        ("do not fit shape and dtype",),
    ),
    "eight huge dimensions": (pack(header_of(*AB, shape=[1 << 62] * 8), DATA), ("do not fit shape and dtype",)),
    "nine dimensions": (pack(header_of(*AB, shape=[1] * 8 + [4]), DATA), ("broken shape", "at most 8")),
    "wrong size for the shape": (pack(header_of(*AB, shape=[5]), DATA), ("do not fit shape and dtype", "16", "20")),
    # offsets
    "negative start": (pack(header_of(*AB, data_offsets=[-16, 0]), DATA), ("broken offsets", "-16")),
    "stop before start": (pack(header_of(*AB, data_offsets=[40, 24]), DATA), ("do not fit", "[40, 24)")),
    "one offset": (pack(header_of(*AB, data_offsets=[24]), DATA), ("broken offsets", "'b'")),
    "three offsets": (pack(header_of(*AB, data_offsets=[24, 40, 40]), DATA), ("broken offsets",)),
    "float offsets": (pack(header_of(*AB, data_offsets=[24.0, 40]), DATA), ("broken offsets",)),
    "boolean offset": (pack(header_of(*AB, data_offsets=[False, 16]), DATA), ("broken offsets",)),
    "huge offsets": (pack(header_of(*AB, data_offsets=[1 << 70, (1 << 70) + 16]), DATA), ("broken offsets",)),
    "overlap": (pack(header_of(*AB, data_offsets=[20, 36]), DATA), ("overlaps", "'b'", "start 20", "start 24")),
    "the same bytes twice": (pack(header_of(("a", [4]), ("b", [4]), data_offsets=[0, 16]), bytes(16)), ("overlaps",)),
    "hole": (pack(header_of(*AB, data_offsets=[28, 44]), bytes(44)), ("hole", "'b'", "start 28", "start 24")),
    "hole at the begin": (pack(header_of(("a", [4]), data_offsets=[4, 20]), bytes(20)), ("hole", "start 4")),
    "beyond the end": (pack(header_of(*AB), DATA[:-1]), ("truncated", "'b'", "fetch the file again")),
    "far beyond the end": (
        pack(header_of(*AB, shape=[1 << 40], data_offsets=[24, 24 + (1 << 42)]), DATA),
        ("truncated", "'b'"),
    ),
    "trailing bytes": (pack(header_of(*AB), DATA + b"x"), ("does not end where its last tensor ends",)),
    "data without tensors": (pack({}, b"x"), ("does not end where its last tensor ends",)),
    # names
    "empty name": (pack(header_of(("", [4])), bytes(16)), ("name not allowed", "''")),
    "name with ..": (pack(header_of(("a/../../b", [4])), bytes(16)), ("name not allowed", "..")),
    "name with /": (pack(header_of(("/etc/passwd", [4])), bytes(16)), ("name not allowed",)),
    "name with NUL": (pack(header_of(("a\0b", [4])), bytes(16)), ("name not allowed", r"\x00")),
    "name with a line break": (pack(header_of(("a\nerror: b", [4])), bytes(16)), ("name not allowed", r"\n")),
    "name with an escape": (pack(header_of(("\x1b[2J", [4])), bytes(16)), ("name not allowed", r"\x1b")),
    "name with half a character": (pack(b'{"\\ud800":{}}'), ("name not allowed", r"\ud800")),
    "name that turns the text around": (pack(header_of(("a\u202eb", [4])), bytes(16)), ("name not allowed", r"\u202e")),
    "name of 10 kB": (pack(header_of(("a" * 10_000, [4])), bytes(16)), ("name not allowed", "at most 1024")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused(case: str, tmp_path: Path) -> None:
    content, words = BROKEN[case]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with untouched(tmp_path), pytest.raises(StreamquantError) as caught:
        read_header(path)
    message = str(caught.value)
    for word in (*words, str(path)):
        assert word in message
    assert len(message) < 2000, "a file must not fill the screen"
    assert "\x1b" not in message
    assert caught.value.exit_code == 1


def test_hostile_values_are_shortened_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    long = "x" * 100_000
    for entry in (
        {"dtype": long, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "\x1b[2J\nerror: all is well", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1] * 100_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0"] * 100_000},
        {long: 1},
    ):
        path.write_bytes(pack({"a": entry}, bytes(4)))
        with pytest.raises(StreamquantError) as caught:
            read_header(path)
        assert len(str(caught.value)) < 2000
        assert "\x1b" not in str(caught.value)
        assert "\nerror" not in str(caught.value)
    path.write_bytes(pack(('{"' + long + '":1,"' + long + '":2}').encode()))
    with pytest.raises(StreamquantError, match="duplicate key") as caught:
        read_header(path)
    assert len(str(caught.value)) < 2000


def test_valid_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    header = {"__metadata__": {"format": "pt"}, **header_of(*AB)}
    path.write_bytes(pack(header, DATA))
    tensors, metadata, raw = read_header(path)
    begin = len(raw)
    assert metadata == {"format": "pt"}
    assert [(t.name, t.dtype, t.shape, t.start - begin, t.stop - begin) for t in tensors.values()] == [
        ("a", "F32", (2, 3), 0, 24),
        ("b", "F32", (4,), 24, 40),
    ]


def test_order_of_the_header_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(pack(dict(reversed(header_of(*AB).items())), DATA))
    assert list(read_header(path)[0]) == ["a", "b"]


def test_header_against_the_safetensors_library(tmp_path: Path) -> None:
    """What we write the library reads, and the other way around."""
    values: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int8),
    }
    save_file(values, tmp_path / "theirs.safetensors")
    stored, _, _ = read_header(tmp_path / "theirs.safetensors")
    raw = (tmp_path / "theirs.safetensors").read_bytes()
    for name, array in values.items():
        assert raw[stored[name].start : stored[name].stop] == array.tobytes()
        assert stored[name].shape == array.shape
    ours = write_header([("b", "F32", (2, 3), 24), ("a", "I8", (5,), 5)], {"format": "pt"})
    loaded = load(ours + values["b"].tobytes() + values["a"].tobytes())
    assert all(np.array_equal(loaded[name], array) for name, array in values.items())


def test_shard_that_is_no_regular_file(tmp_path: Path) -> None:
    """A folder, a pipe that would block for ever, a device: refused at once."""
    model = write_model(tmp_path / "Tiny", shards=2)
    victim = shards_of(model)[0]
    victim.unlink()
    makers: list[Callable[[Path], None]] = [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
    for make in makers:
        make(victim)
        with pytest.raises(StreamquantError) as caught:
            open_checkpoint(model)
        assert str(victim) in str(caught.value)
        if victim.is_dir():
            victim.rmdir()
        else:
            victim.unlink()


def test_folder_that_cannot_be_read_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(StreamquantError, match="cannot read") as caught:
        read_header(tmp_path / "missing.safetensors")
    assert "No such file" in str(caught.value)


# Hypothesis: whatever is in a header, it is read or refused


def tiny_shard() -> tuple[dict[str, Any], bytes]:
    header = {"__metadata__": {"format": "pt"}, **header_of(("a", [2, 3]), ("b", [4]), ("c", []))}
    return header, bytes(24 + 16 + 4)


def read_or_refuse(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    message = ""
    try:
        tensors, _, raw = read_header(path)
    except StreamquantError as error:
        message = str(error)
    if message:
        assert str(path) in message
        assert len(message) < 5000
        return False
    at = len(raw)
    for tensor in tensors.values():  # what was accepted keeps the promises
        assert tensor.start == at
        at = tensor.stop
        assert tensor.dtype in DTYPE_BITS
        assert all(type(dimension) is int and dimension >= 0 for dimension in tensor.shape)
    assert at == len(content)
    return True


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_bytes_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    raw = bytearray(pack(*tiny_shard()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("set", "insert", "delete", "cut"))):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del raw[at : at + data.draw(st.integers(1, 9))]
            case "cut":
                del raw[at + 1 :]
        if not raw:
            break
    read_or_refuse(tmp_path / "shard.safetensors", bytes(raw))


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 1 << 65), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.sampled_from(list(DTYPE_BITS)),
)


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_fields_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    header, payload = tiny_shard()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*header, "new"]))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "other", None]))
        value = data.draw(ODD_VALUES)
        if field is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name][field] = value
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    read_or_refuse(tmp_path / "shard.safetensors", pack(text, payload))


def test_mutation_tests_reach_success(tmp_path: Path) -> None:
    """The two tests above would be empty if their start were refused already."""
    assert read_or_refuse(tmp_path / "shard.safetensors", pack(*tiny_shard()))


# The checkpoint


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pristine") / "Tiny", shards=3)


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "Tiny"))


def weight_map(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def set_index(folder: Path, **entries: Any) -> None:
    """Change entries of the weight map; ... removes one."""
    merged = {**weight_map(folder), **entries}
    merged = {name: file for name, file in merged.items() if file is not ...}
    edit_json(folder / INDEX, weight_map=merged)


NORM = "model.norm.weight"


def unlink_all(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def first_shard(folder: Path) -> Path:
    return shards_of(folder)[0]


def drop_from_shard(folder: Path) -> None:
    """A shard of an older version: without one tensor, data and all."""
    header, data = unpack(shards_of(folder)[-1])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    start = header.pop(last)["data_offsets"][0]
    shards_of(folder)[-1].write_bytes(pack(header, data[:start]))


def add_to_shard(folder: Path, name: str = "extra.weight", dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> None:
    header, data = unpack(first_shard(folder))
    size = DTYPE_BITS[dtype] // 8
    for dimension in shape:
        size *= dimension
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
    first_shard(folder).write_bytes(pack(header, data + bytes(size)))


def add_indexed(folder: Path, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> None:
    add_to_shard(folder, dtype=dtype, shape=shape)
    set_index(folder, **{"extra.weight": first_shard(folder).name})


def index_text(folder: Path, text: bytes) -> None:
    (folder / INDEX).write_bytes(text)


CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a shard is missing": (lambda f: first_shard(f).unlink(), ("missing shard", "model-00001-of-00003", "download")),
    "a shard is cut": (lambda f: os.truncate(first_shard(f), 5000), ("truncated", "model-00001-of-00003", "fetch")),
    "a shard is cut in its header": (lambda f: os.truncate(first_shard(f), 100), ("truncated", "header alone")),
    "a shard is empty": (lambda f: os.truncate(first_shard(f), 0), ("not a safetensors file", "0 bytes")),
    "a shard is a web page": (
        lambda f: first_shard(f).write_text("<!DOCTYPE html><html>404</html>"),
        ("header too large", "model-00001"),
    ),
    "a shard is a pointer of Git LFS": (
        lambda f: first_shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        ("header too large", "model-00001"),
    ),
    "a tensor of the index is in no shard": (drop_from_shard, ("of the index is in no shard", INDEX, "00003-of-00003")),
    "a tensor of the index does not exist": (
        lambda f: set_index(f, **{"model.more.weight": first_shard(f).name}),
        ("of the index is in no shard", "model.more.weight"),
    ),
    "a tensor of a shard is not in the index": (add_to_shard, ("not in the index", "extra.weight", "model-00001")),
    "the index forgot a tensor": (lambda f: set_index(f, **{NORM: ...}), ("not in the index", NORM)),
    "the index names another shard": (
        lambda f: set_index(f, **{NORM: first_shard(f).name}),
        ("index and shards disagree", NORM, "model-00003", "model-00001"),
    ),
    "a tensor is in two shards": (lambda f: add_to_shard(f, NORM), ("tensor occurs twice", NORM, "model-000")),
    "the index leaves the folder": (lambda f: set_index(f, x="../secret.safetensors"), ("outside", "../secret")),
    "the index has an absolute path": (lambda f: set_index(f, x="/etc/x.safetensors"), ("outside", "/etc/x")),
    "the index has a folder": (lambda f: set_index(f, x="sub/x.safetensors"), ("outside", "sub/x", "plain file name")),
    "the index has NUL": (lambda f: set_index(f, x="a\0.safetensors"), ("outside", r"\x00")),
    "the index has a line break": (lambda f: set_index(f, x="a\n.safetensors"), ("outside", r"\n")),
    "the index has ..": (lambda f: set_index(f, x=".."), ("outside", "'..'")),
    "the index has an empty name": (lambda f: set_index(f, x=""), ("outside", "''")),
    "the index has a number": (lambda f: set_index(f, x=7), ("outside", "7")),
    "the index has null": (lambda f: set_index(f, x=None), ("outside", "None")),
    "the index has a pickle": (lambda f: set_index(f, x="pytorch_model.bin"), ("not safetensors", "pytorch_model.bin")),
    "the index has a name of 300 letters": (
        lambda f: set_index(f, x="a" * 300 + ".safetensors"),
        ("missing shard", "name too long"),
    ),
    "the index is empty": (lambda f: index_text(f, b""), ("broken JSON", INDEX)),
    "the index is a list": (lambda f: index_text(f, b"[]"), ("unexpected JSON", INDEX, "list")),
    "the index has no weight map": (lambda f: index_text(f, b"{}"), ("broken index", "weight_map")),
    "the weight map is a list": (lambda f: index_text(f, b'{"weight_map":[]}'), ("broken index", "weight_map")),
    "the weight map is empty": (lambda f: index_text(f, b'{"weight_map":{}}'), ("broken index", "weight_map")),
    "the index has a key twice": (
        lambda f: index_text(f, b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'),
        ("duplicate key 'a'", INDEX),
    ),
    "the index is nested": (lambda f: index_text(f, DEEP), ("nested too deeply", INDEX)),
    "there is no index, and a shard is missing": (
        lambda f: unlink_all(f / INDEX, first_shard(f)),
        ("shards without an index, and not all of them", "model-00001"),
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), ("no config.json", "not a Hugging Face checkpoint")),
    "config.json is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ("unexpected JSON", "config.json", "list"),
    ),
    "config.json is broken": (lambda f: (f / "config.json").write_text("{"), ("broken JSON", "config.json")),
    "config.json has NaN": (lambda f: (f / "config.json").write_text('{"a":NaN}'), ("NaN", "config.json")),
    "integer weights": (
        lambda f: add_indexed(f, dtype="I64"),
        ("dtype cannot be converted", "extra.weight", "I64", "BF16, F16, F32", "unquantized"),
    ),
    "FP8 weights": (
        lambda f: add_indexed(f, dtype="F8_E4M3"),
        ("dtype cannot be converted", "extra.weight", "F8_E4M3"),
    ),
    "a tensor with zero elements": (
        lambda f: add_indexed(f, shape=(0, 4)),
        ("tensor without weights", "extra.weight", "[0, 4]"),
    ),
    "an unknown dtype": (lambda f: rewrite(first_shard(f), {"x": {"dtype": "Q"}}), ("model-00001",)),
}


@pytest.mark.parametrize("case", CHECKPOINT_FAULTS)
def test_broken_checkpoint_is_refused(case: str, sharded: Path) -> None:
    spoil, words = CHECKPOINT_FAULTS[case]
    spoil(sharded)
    with untouched(sharded), pytest.raises(StreamquantError) as caught:
        open_checkpoint(sharded)
    for word in (*words, str(sharded)):
        assert word in str(caught.value)
    assert caught.value.exit_code == 1


def test_pickles_are_not_read(sharded: Path) -> None:
    for shard in shards_of(sharded):
        shard.rename(shard.with_suffix(".bin"))
    (sharded / INDEX).unlink()
    with pytest.raises(StreamquantError, match="pickle files run code") as caught:
        open_checkpoint(sharded)
    assert "convert them to safetensors first" in str(caught.value)


def test_folder_without_weights(sharded: Path) -> None:
    for path in sharded.iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(StreamquantError, match="no weights to convert"):
        open_checkpoint(sharded)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UsageError, match="no such model folder"):
            open_checkpoint(path)


def test_checkpoint_is_in_the_order_of_the_disk(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    places = [(tensor.file, tensor.start) for tensor in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert {file.name for file in checkpoint.files} == {path.name for path in shards_of(sharded)}
    assert checkpoint.nbytes == sum(file.size for file in checkpoint.files) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards_of(sharded)
    )
    assert "README.md" in checkpoint.side_files


def test_weights_in_other_forms_stay_behind(sharded: Path) -> None:
    for name in ("pytorch_model.bin", "x.gguf", "consolidated.PTH", "model.onnx", "other.safetensors", ".hidden"):
        (sharded / name).write_bytes(b"x")
    (sharded / "original").mkdir()
    (sharded / "original" / "notes.txt").write_text("x")
    checkpoint = open_checkpoint(sharded)
    names = ("pytorch_model.bin", "x.gguf", "consolidated.PTH", "model.onnx", "other.safetensors", "original/")
    assert set(names) == set(checkpoint.ignored_files)
    assert not set(names) & set(checkpoint.side_files)


@pytest.mark.parametrize("change", ["touch", "shorter", "longer", "replaced", "gone"])
def test_check_unchanged(change: str, sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    checkpoint.check_unchanged()
    victim = shards_of(sharded)[1]
    match change:
        case "touch":
            os.utime(victim, ns=(1, 1))
        case "shorter":
            os.truncate(victim, 100)
        case "longer":
            os.truncate(victim, victim.stat().st_size + 1)
        case "replaced":
            shards_of(sharded)[0].replace(victim)
        case "gone":
            victim.unlink()
    with pytest.raises(StreamquantError) as caught:
        checkpoint.check_unchanged()
    assert str(victim) in str(caught.value) or str(shards_of(sharded)[0]) in str(caught.value) or change == "replaced"


@pytest.mark.parametrize("seed", range(30))
def test_damaged_folder_is_read_or_refused(seed: int, sharded: Path) -> None:
    """Random damage to random files: a checkpoint or a message, nothing else."""
    chance = random.Random(seed)
    victims = [sharded / INDEX, sharded / "config.json", *shards_of(sharded)]
    for path in chance.sample(victims, 2):
        raw = bytearray(path.read_bytes())
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(min(len(raw), 2000))
            raw[at] = chance.randrange(256)
        if chance.random() < 0.3:
            del raw[chance.randrange(len(raw)) :]
        path.write_bytes(raw)
    with contextlib.suppress(StreamquantError):
        open_checkpoint(sharded)


# JSON


def test_strict_json(tmp_path: Path) -> None:
    assert parse_json(b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', "x") == {"a": [1, 2.5, None, True, "é"]}
    for text, word in (
        (b"", "broken JSON"),
        (b"{'a': 1}", "broken JSON"),
        (b'{"a": 1,}', "broken JSON"),
        (b'{"a": 1e999}', "broken JSON"),
        (b'{"a": -1e999}', "broken JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "broken JSON"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":1,"b":{"c":1,"c":1}}', "duplicate key 'c'"),
    ):
        with pytest.raises(StreamquantError, match=word) as caught:
            parse_json(text, "the place")
        assert "the place" in str(caught.value)


def test_json_file_is_measured_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(b"[1, 2, 3]")
    assert read_json(path, max_bytes=9) == [1, 2, 3]
    with pytest.raises(StreamquantError, match="too large") as caught:
        read_json(path, max_bytes=8)
    assert "9 bytes" in str(caught.value)
    with pytest.raises(StreamquantError, match="an object at the top level"):
        read_json_object(path)
    with pytest.raises(StreamquantError, match="cannot read a file"):
        read_json(tmp_path / "missing.json")


def test_index_of_one_file_is_fine(tmp_path: Path) -> None:
    model = write_model(tmp_path / "Tiny")
    header, _ = unpack(model / SINGLE_FILE)
    names = {name: SINGLE_FILE for name in header if name != "__metadata__"}
    (model / INDEX).write_text(json.dumps({"weight_map": names}))
    assert set(open_checkpoint(model).tensors) == set(names)
