"""`python -m tests.fuzz [--seconds N] [TARGET ...]`: coverage-guided fuzzing with atheris, a process for each target.

An input that breaks a target is kept as NAME-fault in `.fuzz/`, one that takes more than five seconds or 2 GB as
NAME-timeout-... or NAME-oom-...: mend the fault and put the input into the corpus.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["streamquant", "gguf", "yaml"]):
    from tests.fuzz.targets import CORPUS, TARGETS, answer

LARGEST = 32768
"""Bytes of an input."""
FOUND = Path(".fuzz")


def main() -> int:
    """Fuzz the targets one after another; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--here", action="store_true", help="in this process; one target")
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET")
    options = parser.parse_args()
    if not options.here:
        command = [sys.executable, "-m", "tests.fuzz", "--here", "--seconds", str(options.seconds)]
        codes = {name: subprocess.run([*command, name], check=False).returncode for name in options.targets or TARGETS}
        failed = [name for name, code in codes.items() if code]
        sys.stdout.write(f"failed: {', '.join(failed) or 'none'}\n")
        return int(bool(failed))
    (name,) = options.targets
    FOUND.mkdir(exist_ok=True)
    limits = (f"-max_total_time={options.seconds}", f"-max_len={LARGEST}", "-timeout=5", "-rss_limit_mb=2048")
    seeds = FOUND / f"corpus-{name}"  # what is new goes here, not into the repository
    seeds.mkdir(exist_ok=True)
    places = (f"-artifact_prefix={FOUND}/{name}-", "-print_final_stats=0", "-verbosity=1", str(seeds))
    atheris.Setup([sys.argv[0], *limits, *places, str(CORPUS / name)], lambda data: _run(name, data))
    atheris.Fuzz()
    return 0


def _run(name: str, data: bytes) -> None:
    try:
        answer(name, data)
    except BaseException:
        (FOUND / f"{name}-fault").write_bytes(data)
        raise


if __name__ == "__main__":
    sys.exit(main())
