"""The layer-streamed pass: against transformers' resident forward, three variants against none, imatrix, memory.

The contenders of a comparison take turns within one fresh process (`python -m benchmarks.validation JOB`), so that
importing torch and transformers, which takes as long as a short pass, is in none of the times.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.conversions import Setting
from benchmarks.measure import CORES, Contender, Sample, run
from benchmarks.page import Section, Target, table
from examples.smollm2_checkpoint import FOLDER, write_smollm2
from streamquant.convert.conversion import convert
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from tests import synthetic
from tests.peers import DATA, ROOT
from tests.smollm2 import MISSING, PACKAGE, find_gguf

TEXT = DATA / "text" / "wiki.test.raw"
VARIANTS = ("fp8-dynamic", "gguf:Q8_0", "gguf:Q4_0")
CONTEXT, BATCH = 512, 4
DEPTHS = (4, 16)
LAYER = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""15.2 million weights, 61 MB in float32."""


def validation(setting: Setting) -> Section:
    """Time the pass on SmolLM2, and look at its memory on models of two depths."""
    section = Section("Validation")
    if find_gguf() is None or not TEXT.is_file():
        section.blocks.append(f"Not run: {MISSING if find_gguf() is None else f'no {TEXT}'}.")
        return section
    chunks, rounds = (2, 1) if setting.quick else (20, 3)
    source = write_smollm2(PACKAGE, setting.work / FOLDER)
    out = setting.work / "variants"
    convert(make_plan(open_checkpoint(source), parse_variants(list(VARIANTS))), out, RunOptions(jobs=CORES))
    times = {
        name: measure(setting, name, source=str(source), variants=str(out), chunks=chunks, rounds=rounds)
        for name in ("resident", "lockstep", "imatrix")
    }
    add_times(section, times, chunks)
    add_memory(section, setting)
    return section


Times = dict[str, list[list[float]]]


def measure(setting: Setting, job: str, **arguments: object) -> Times:
    """[seconds, CPU seconds] of each contender of a job, by round."""
    result = setting.work / f"{job}.json"
    command = [sys.executable, "-m", "benchmarks.validation", job, json.dumps({**arguments, "result": str(result)})]
    sample = run(Contender(job, command, [], {"PYTHONPATH": str(ROOT)}), setting.log)
    print(f"  {job}: {sample.wall:.0f} s (others took {sample.others:.0%} of the cores)", flush=True)
    found: Times = json.loads(result.read_text())
    return found


def ratio_of(times: Times, name: str, base: str, unit: int) -> float:
    """The median over the rounds of a contender's seconds (unit 0) or CPU seconds (1) over the other's."""
    return median(a[unit] / b[unit] for a, b in zip(times[name], times[base], strict=True))


def add_times(section: Section, times: Mapping[str, Times], chunks: int) -> None:
    """The three ratios."""
    tokens = chunks * CONTEXT
    pairs = (
        ("resident", "streamed pass", "transformers, resident", 1.3, "the streamed pass against a resident model"),
        ("lockstep", "original and three variants", "original alone", 4.2, "three variants in lock step against none"),
        ("imatrix", "importance matrix", "pass alone", 1.15, "the importance matrix against a plain pass"),
    )
    rows = []
    for job, name, base, limit, what in pairs:
        ratio, of_cpu = (ratio_of(times[job], name, base, unit) for unit in (0, 1))
        found = f"{ratio:.2f}x; CPU seconds {of_cpu:.2f}x"
        why = _beyond_passes(times[job][name], times[job][base]) if job == "lockstep" else ""
        section.targets.append(Target(what, f"<= {limit}x", found, ratio <= limit, why))
        for contender, rounds in times[job].items():
            seconds = [wall for wall, _ in rounds]
            best, cpu = min(seconds), min(cpu for _, cpu in rounds)
            rows.append([contender, f"{best:.1f}", f"{max(seconds):.1f}", f"{cpu:.1f}", f"{tokens / best:,.0f}"])
    section.blocks += [
        f"SmolLM2-135M, {chunks} chunks of {CONTEXT} tokens of wikitext-2, {BATCH} chunks at a time, float32, all "
        "cores. Streamed times include reading and decoding every weight; the resident model is loaded before. Both "
        "make the logits of all tokens. The comparison makes those of the scored half, and all statistics; its "
        f"variants are {', '.join(VARIANTS)} with quantized activations emulated, and the error of every tensor. "
        "Ratios are the medians of the rounds.",
        table(["contender", "best s", "longest s", "least CPU s", "tokens/s"], rows),
    ]


def _beyond_passes(models: list[list[float]], alone: list[list[float]]) -> str:
    """What a comparison does beside a pass of each model."""
    together, single = (min(cpu for _, cpu in rounds) for rounds in (models, alone))
    passes = (len(VARIANTS) + 1) * single
    return (
        f"of {together:.1f} CPU seconds {passes:.1f} are {len(VARIANTS) + 1} passes; in the others activations are "
        "quantized, weights decoded and compared with the original's, and distributions compared"
    )


def add_memory(section: Section, setting: Setting) -> None:
    """Peak of the process with two models of 4 and of 16 layers."""
    samples: dict[int, Sample] = {}
    for layers in DEPTHS:
        size = {**LAYER, "num_hidden_layers": layers}
        folder = synthetic.write_checkpoint(setting.work / f"depth-{layers}", size=size)
        command = [sys.executable, "-m", "benchmarks.validation", "depth", json.dumps({"source": str(folder)})]
        samples[layers] = run(Contender("depth", command, [], {"PYTHONPATH": str(ROOT)}), setting.log)
    peaks = {layers: max(sample.resident, sample.largest) for layers, sample in samples.items()}
    shallow, deep = (peaks[layers] for layers in DEPTHS)
    found = f"{shallow / 2**20:.0f} and {deep / 2**20:.0f} MiB"
    what = f"peak memory of two models of {DEPTHS[0]} and of {DEPTHS[1]} layers"
    section.targets.append(Target(what, "same within 10%", found, deep <= 1.1 * shallow))
    resident = 2 * DEPTHS[1] * 61
    section.blocks.append(
        f"Two models in lock step, layers of 15.2 million weights (61 MB in float32): {found} with {DEPTHS[0]} and "
        f"{DEPTHS[1]} layers, Python and its libraries included; resident, the {DEPTHS[1]} layers alone would take "
        f"{resident} MB."
    )


# In a process of its own


def take_turns(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[list[float]]]:
    """[seconds, CPU seconds] of each by round, A B A B ..., after one call of each on little that is not timed."""
    found: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start, cpu = time.perf_counter(), time.process_time()
            contender()
            found[name].append([time.perf_counter() - start, time.process_time() - cpu])
    return found


def main(job: str, arguments: dict[str, Any]) -> None:
    """Run a job and write its times to `result`."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = Path(arguments["source"])
    if job == "depth":
        run_depth(source)
        return
    contenders = {"resident": resident, "lockstep": lockstep, "imatrix": imatrix}[job](source, arguments)
    Path(arguments["result"]).write_text(json.dumps(take_turns(contenders, arguments["rounds"])))


def corpus_of(source: Path, chunks: int) -> Any:
    """The first chunks of wikitext-2."""
    from streamquant.model.corpus import read_corpus

    return read_corpus([TEXT], source, CONTEXT, chunks)


def resident(source: Path, arguments: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """transformers with all layers in memory, against the streamed pass with the head."""
    import torch
    from transformers import AutoModelForCausalLM

    from streamquant.model.forward import Head, Lane, run_layers
    from streamquant.model.forward import Setting as Computation
    from streamquant.model.variants.open import open_variant

    tokens = corpus_of(source, arguments["chunks"]).tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def whole() -> None:
        with torch.inference_mode():
            for first in range(0, len(tokens), BATCH):
                model(torch.from_numpy(tokens[first : first + BATCH]), use_cache=False)

    def streamed(ids: Any = tokens) -> None:
        lane, setting = Lane(open_variant(source)), Computation(batch_tokens=BATCH * CONTEXT)
        run_layers([lane], ids, setting)
        head = Head(lane, setting)
        assert lane.hidden is not None
        for rows in lane.hidden:
            head.logits(rows)

    streamed(tokens[:1, :16])
    return {"streamed pass": streamed, "transformers, resident": whole}


def lockstep(source: Path, arguments: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """A comparison with three variants, against one with none."""
    from streamquant.model.forward import Setting as Computation
    from streamquant.model.variants.open import open_variant
    from streamquant.validate.logits.comparison import ComparisonOptions, compare

    out = Path(arguments["variants"])
    paths = [*out.glob("*-FP8-dynamic"), *sorted(out.glob("*-GGUF/*.gguf"))]
    corpus = corpus_of(source, arguments["chunks"])
    options = ComparisonOptions(Computation(batch_tokens=BATCH * CONTEXT))
    compare(open_variant(source), [open_variant(path) for path in paths], corpus_of(source, 1), options)
    return {
        "original and three variants": lambda: compare(
            open_variant(source), [open_variant(path) for path in paths], corpus, options
        ),
        "original alone": lambda: compare(open_variant(source), [], corpus, options),
    }


def imatrix(source: Path, arguments: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The importance matrix, against the pass that it comes from."""
    from streamquant.calibrate.importance import ImportanceOptions, write_importance
    from streamquant.model.forward import Lane, run_layers
    from streamquant.model.forward import Setting as Computation
    from streamquant.model.variants.open import open_variant

    corpus, setting = corpus_of(source, arguments["chunks"]), Computation(batch_tokens=BATCH * CONTEXT)
    run_layers([Lane(open_variant(source))], corpus.tokens[:1, :16], setting)

    def importance() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_importance(open_variant(source), corpus, Path(folder) / "imatrix.gguf", ImportanceOptions(setting))

    return {
        "importance matrix": importance,
        "pass alone": lambda: run_layers([Lane(open_variant(source))], corpus.tokens, setting),
    }


def run_depth(source: Path) -> None:
    """Two models in lock step over 4 short chunks."""
    import numpy as np

    from streamquant.model.forward import Lane, run_layers
    from streamquant.model.forward import Setting as Computation
    from streamquant.model.variants.open import open_variant

    tokens = np.random.default_rng(0).integers(0, 512, (4, 128))
    run_layers([Lane(open_variant(source)) for _ in range(2)], tokens, Computation())


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
