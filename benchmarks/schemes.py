"""compressed-tensors' data-free schemes against llm-compressor's model_free_ptq, one by one and together."""

import shutil

from benchmarks import commands
from benchmarks.conversions import US, Setting, profile
from benchmarks.measure import run, take_turns, warm
from benchmarks.page import Section, Target, others, results_table
from benchmarks.sources import llama, source_bytes
from streamquant.convert.recipes.recipe import RECIPES

VARIANTS = ("w8a8", "w4a16", "w4a16-asym", "mxfp8", "mxfp4a16", "nvfp4a16")
TOGETHER = f"{US}, all of them from one read"


def schemes(setting: Setting) -> Section:
    """Each scheme against the library's, and all of them at once."""
    layers, width = (2, 1024) if setting.quick else (6, 2048)
    # One shard: of several, model_free_ptq refuses NVFP4 where q, k and v of two layers are scattered.
    source = llama(setting.work / f"llama-{layers}", layers, width=width, shards=1)
    warm(source)
    ours = {name: commands.streamquant(f"{US} {name}", source, [name], setting.work / name) for name in VARIANTS}
    theirs = {
        name: commands.llm_compressor(
            f"model_free_ptq {name}", source, setting.work / f"their-{name}", scheme=RECIPES[name].scheme or ""
        )
        for name in VARIANTS
    }
    together = commands.streamquant(TOGETHER, source, [*VARIANTS], setting.work / "together")
    for contender in (*ours.values(), together):
        run(contender, setting.log)  # untimed: compiles kernels, and asks compressed-tensors for its configs
    turns = [contender for name in VARIANTS for contender in (ours[name], theirs[name])]
    results = take_turns([*turns, together], setting.repeats(2), setting.log)
    read = source_bytes(source)
    costs, sentence = profile(setting, source, ["nvfp4a16"])
    shutil.rmtree(source)
    ratios = {name: results.wall(theirs[name].name) / results.wall(ours[name].name) for name in VARIANTS}
    slowest = min(ratios, key=lambda name: ratios[name])
    everything = sum(results.wall(contender.name) for contender in theirs.values()) / results.wall(TOGETHER)
    section = Section("Data-free schemes of compressed-tensors")
    section.targets.append(
        Target(
            "each data-free scheme against llm-compressor's model_free_ptq",
            ">= 8x",
            f"{ratios[slowest]:.1f}x ({slowest}, the least) to {max(ratios.values()):.1f}x; all from one read "
            f"{everything:.1f}x",
            ratios[slowest] >= 8,
            sentence,
        )
    )
    section.blocks += [
        f"A Llama of {read / 2e9:.2f}B weights ({read / 1e9:.2f} GB) in one shard, and the same scheme on both sides. "
        "For NVFP4 the largest weight is found first.",
        results_table(results, TOGETHER, read),
        others(results),
        costs,
    ]
    return section
