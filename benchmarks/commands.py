"""The command lines of streamquant and of its peers."""

import shlex
import sys
from pathlib import Path

from benchmarks.measure import CORES, Contender
from tests import llama_cpp
from tests.peers import CONVERTER, ROOT

STREAMQUANT = str(Path(sys.executable).with_name("streamquant"))
_PTQ = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(
    model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[4],
    ignore=["lm_head", "model.embed_tokens", *sys.argv[5:]], max_workers=int(sys.argv[3]), device="cpu",
)
"""
# SHA-256 by OpenSSL, a thread per core: coreutils' sha256sum does not use the CPU's SHA instructions.
_HASH = """
import hashlib, pathlib, sys
from concurrent.futures import ThreadPoolExecutor
def digest(path):
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
paths = sorted(p for folder in sys.argv[2:] for p in pathlib.Path(folder).glob("*.safetensors"))
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    for path, found in zip(paths, pool.map(digest, paths)):
        print(found, path)
"""


def streamquant(name: str, source: Path, variants: list[str], out: Path, repeats: int | None = None) -> Contender:
    """`streamquant convert` with all defaults."""
    flags = [flag for variant in variants for flag in ("--to", variant)]
    return Contender(name, [STREAMQUANT, "convert", str(source), *flags, "--out", str(out)], [out], repeats=repeats)


def first_run(name: str, source: Path, variants: list[str], out: Path, cache: Path) -> Contender:
    """The same with empty caches: Numba compiles, and compressed-tensors is asked for its quantization_config."""
    plain = streamquant(name, source, variants, out)
    empty = {"NUMBA_CACHE_DIR": str(cache / "numba"), "XDG_CACHE_HOME": str(cache)}
    return Contender(name, plain.command, [out, cache], empty, repeats=1)


def llm_compressor(
    name: str,
    source: Path,
    out: Path,
    repeats: int | None = None,
    ignore: tuple[str, ...] = (),
    scheme: str = "FP8_DYNAMIC",
) -> Contender:
    """llm-compressor's streaming path, with a worker per core (its default is one)."""
    command = [sys.executable, "-c", _PTQ, str(source), str(out), str(CORES), scheme, *ignore]
    return Contender(name, command, [out], repeats=repeats)


def converter(name: str, source: Path, out: Path, repeats: int | None = None, outtype: str = "q8_0") -> Contender:
    """llama.cpp's convert_hf_to_gguf.py."""
    script = str(CONVERTER / "convert_hf_to_gguf.py")
    command = [sys.executable, script, str(source), "--outtype", outtype, "--outfile", str(out)]
    return Contender(name, command, [out], {"PYTHONPATH": str(CONVERTER)}, repeats)


def quantizer(name: str, source: Path, file_types: list[str], out: Path, repeats: int | None = None) -> Contender:
    """llama.cpp's way to some file types: a BF16 GGUF in the folder `out`, then llama-quantize for each of them."""
    unquantized = out / "unquantized.gguf"
    first = converter(name, source, unquantized, outtype="bf16")
    steps = [["mkdir", str(out)], list(first.command)]
    steps += [
        [str(llama_cpp.program()), str(unquantized), str(out / f"{file_type}.gguf"), file_type]
        for file_type in file_types
    ]
    script = " && ".join(shlex.join(step) for step in steps)
    return Contender(name, ["sh", "-c", script], [out], first.environment, repeats)


def copy(name: str, source: Path, out: Path) -> Contender:
    """`cp -r` to a fresh target."""
    return Contender(name, ["cp", "-r", str(source), str(out)], [out])


def copy_durably_hashed(name: str, source: Path, out: Path) -> Contender:
    """cp, fsync of the copies, SHA-256 of source and copy: what a conversion does besides converting."""
    script = (
        f"cp -r {_quoted(source, out)} && sync {_quoted(out)}/*.safetensors && "
        f"exec {shlex.join([sys.executable, '-c', _HASH, str(CORES), str(source), str(out)])}"
    )
    return Contender(name, ["sh", "-c", script], [out])


def copy_sha256sum(name: str, source: Path, out: Path) -> Contender:
    """cp, then coreutils' sha256sum of source and copy."""
    script = f"cp -r {_quoted(source, out)} && sha256sum {_quoted(source)}/*.safetensors {_quoted(out)}/*.safetensors"
    return Contender(name, ["sh", "-c", script], [out])


def profiled(source: Path, variants: list[str], out: Path, report: Path) -> Contender:
    """`streamquant convert` under benchmarks.cpu_profile, which writes JSON to `report`."""
    plain = streamquant("profile", source, variants, out)
    command = [sys.executable, "-m", "benchmarks.cpu_profile", str(report), *plain.command[1:]]
    return Contender("profile", command, [out], {"PYTHONPATH": str(ROOT)}, repeats=1)


def kernels(report: Path, seconds: float) -> Contender:
    """The kernels, in a process of their own with one thread."""
    command = [sys.executable, "-m", "benchmarks.kernels", str(report), str(seconds)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return Contender("kernels", command, [], environment)


def _quoted(*paths: Path) -> str:
    return shlex.join([str(path) for path in paths])
