"""Write the goldens of llama-perplexity and llama-imatrix on SmolLM2.

`python -m tests.goldens.make_validation` needs `make setup llama-cpp` and the shared text, takes about a quarter of an
hour on two cores, and writes llama_perplexity.json and llama_imatrix.json beside this file; README.md explains them.
"""

import hashlib
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from examples.smollm2_checkpoint import FOLDER as NAME
from examples.smollm2_checkpoint import write_smollm2
from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests import llama_cpp
from tests.peers import DATA
from tests.smollm2 import PACKAGE

HERE = Path(__file__).parent
TEXT = DATA / "text" / "wiki.test.raw"
BASE, TYPES = "F32", ("BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K")
CONTEXT, CHUNKS, IMATRIX_CHUNKS, THREADS = 512, 20, 4, 2
EVERY = 97
"""Columns of an importance entry that are kept: every 97th."""
_NUMBER = r"(-?[\d.]+)"


def read_tokens(path: Path) -> NDArray[np.int32]:
    """int32[chunks, context] of a file of --kl-divergence-base: magic, n_ctx, n_vocab, n_chunk, tokens, codes."""
    with path.open("rb") as file:
        context, _, chunks = struct.unpack("<Iii", file.read(20)[8:])
        return np.frombuffer(file.read(4 * context * chunks), "<i4").reshape(chunks, context)


def digest(tokens: NDArray[np.int32]) -> str:
    """SHA-256 of the ids as little-endian int64."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def parse_base(text: str) -> dict[str, Any]:
    """The running perplexities of a plain run, and the final one with its error."""
    final = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", text)
    assert final is not None, "llama-perplexity did not finish"
    running = [float(value) for value in re.findall(r"\[\d+\]([\d.]+),", text)]
    return {"running_ppl": running, "final": [float(value) for value in final.groups()]}


def parse_divergence(text: str) -> dict[str, Any]:
    """The line of every chunk, and the statistics at the end, of a run with --kl-divergence."""
    lines = text.splitlines()
    rows = [
        [float(value) for value in re.findall(_NUMBER, line)] for line in lines if re.match(r" +\d+ +[\d.]+ ±", line)
    ]
    assert len(rows) == CHUNKS, "llama-perplexity did not finish"
    final = {}
    for line in lines:
        found = re.match(r"([A-Za-z0-9][^:]*?)\s*: +" + _NUMBER + r"\s*%?\s*(?:± +" + _NUMBER + r")?", line)
        if found and "chunk" not in line and "kl_div" not in line:
            final[" ".join(found[1].split())] = [float(value) for value in found.group(2, 3) if value]
    return {"chunks": rows, "final": final}


def describe_imatrix(path: Path) -> dict[str, Any]:
    """Count, sum and some columns of every entry."""
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    entries = {}
    for name in sorted(name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        sums = tensors[f"{name}.in_sum2"]
        entries[name] = {
            "count": float(tensors[f"{name}.counts"].flat[0]),
            "sum": float(f"{sums.astype(np.float64).sum():.8g}"),
            "some": [float(f"{value:.8g}") for value in sums.reshape(-1)[::EVERY]],
        }
    return entries


def main() -> None:
    """Convert, run the programs, write both files."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_smollm2(PACKAGE, folder / NAME)
        convert(
            make_plan(open_checkpoint(source), parse_variants([f"gguf:{','.join((BASE, *TYPES))}"])),
            folder,
            RunOptions(jobs=THREADS),
        )
        models = {kind: folder / f"{NAME}-GGUF" / f"{NAME}-{kind}.gguf" for kind in (BASE, *TYPES)}
        logits, imatrix = folder / "base.kld", folder / "imatrix.gguf"
        text = ("-f", str(TEXT), "-c", str(CONTEXT))
        kept = ("--kl-divergence-base", str(logits))
        base = _run("llama-perplexity", models[BASE], *text, "--chunks", str(CHUNKS), *kept)
        variants = {
            kind: parse_divergence(
                _run(
                    "llama-perplexity",
                    models[kind],
                    "-c",
                    str(CONTEXT),
                    "--chunks",
                    str(CHUNKS),
                    *kept,
                    "--kl-divergence",
                )
            )
            for kind in TYPES
        }
        _run("llama-imatrix", models[BASE], *text, "--chunks", str(IMATRIX_CHUNKS), "-o", str(imatrix))
        tokens = read_tokens(logits)
        perplexity = {
            "tokens_sha256": digest(tokens),
            "first_tokens": tokens[:, :4].tolist(),
            "base": parse_base(base),
            "variants": variants,
        }
        importance = {
            "chunks": IMATRIX_CHUNKS,
            "tokens_sha256": digest(tokens[:IMATRIX_CHUNKS]),
            "entries": describe_imatrix(imatrix),
        }
    for name, content in (("llama_perplexity.json", perplexity), ("llama_imatrix.json", importance)):
        (HERE / name).write_text(_json(content))


def _run(name: str, model: Path, *arguments: str) -> str:
    """What a program prints."""
    sys.stderr.write(f"{name} on {model.stem}\n")
    command = [str(llama_cpp.program(name)), "-m", str(model), "-t", str(THREADS), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _json(content: dict[str, Any]) -> str:
    """Compact, with line breaks where a reader of a diff wants them."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace('],"', '],\n"').replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    main()
