"""A mixture of experts to FP8, Q4_K_M and Q8_0 against the programs that make them one by one."""

import shutil

from benchmarks import commands
from benchmarks.conversions import US, Setting, profile
from benchmarks.measure import run, take_turns, warm
from benchmarks.mixes import ready
from benchmarks.page import Section, Target, mebibytes, others, results_table
from benchmarks.sources import mixture, source_bytes

VARIANTS = ["fp8-dynamic", "gguf:Q4_K_M,Q8_0"]
GGUF = "convert_hf_to_gguf.py + llama-quantize"
FP8 = "model_free_ptq"
FEW, MANY = 8, 64
FEW_EXPERTS = f"streamquant, {FEW} experts"
LIMIT = 800 * 2**20


def mixtures(setting: Setting) -> Section:
    """64 experts in a layer, and the same weights in 8."""
    section = Section("A mixture of experts")
    if not ready(section):
        return section
    layers, width = (1, 512) if setting.quick else (6, 1024)
    many, few = (mixture(setting.work / f"moe-{n}", n, layers=layers, width=width) for n in (MANY, FEW))
    for source in (many, few):
        warm(source)
    contenders = [
        commands.streamquant(US, many, VARIANTS, setting.work / "out"),
        commands.streamquant(FEW_EXPERTS, few, VARIANTS, setting.work / "few"),
        commands.quantizer(GGUF, many, ["Q4_K_M", "Q8_0"], setting.work / "gguf"),
        commands.llm_compressor(FP8, many, setting.work / "fp8", ignore=("re:.*mlp.gate$",)),
    ]
    run(contenders[0], setting.log)  # untimed: compiles kernels that were changed since
    results = take_turns(contenders, setting.repeats(3), setting.log)
    read = source_bytes(many)
    costs, sentence = profile(setting, many, VARIANTS)
    for source in (many, few):
        shutil.rmtree(source)
    cpu = (results.cpu(GGUF) + results.cpu(FP8)) / results.cpu(US)
    wall = (results.wall(GGUF) + results.wall(FP8)) / results.wall(US)
    by_expert = results.cpu(US) / results.cpu(FEW_EXPERTS)
    peak = results.resident(US)
    section.targets += [
        Target(
            f"{MANY} experts to FP8, Q4_K_M and Q8_0 against {GGUF} and {FP8}, CPU seconds",
            ">= 5x",
            f"{cpu:.1f}x; time {wall:.1f}x; {GGUF} alone {results.cpu(GGUF) / results.cpu(US):.1f}x",
            cpu >= 5,
            sentence,
        ),
        Target(
            f"{MANY} experts in a layer against the same weights in {FEW}, CPU seconds",
            "<= 1.15x",
            f"{by_expert:.2f}x",
            by_expert <= 1.15,
            sentence,
        ),
        Target("peak memory with experts", "<= 800 MiB", f"{mebibytes(peak)} MiB", peak <= LIMIT),
    ]
    section.blocks += [
        f"A Qwen 3 MoE of {read / 2e9:.2f}B weights ({read / 1e9:.2f} GB), {layers} layers of {MANY} experts, with "
        f"Qwen 3's tokenizer: one command against {GGUF} for two file types and llm-compressor's {FP8} for FP8.",
        results_table(results, US, read),
        others(results),
        costs,
    ]
    return section
