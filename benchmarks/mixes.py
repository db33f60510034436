"""llama-quantize's file types against llama.cpp's way: a 16-bit GGUF by its converter, then llama-quantize for each."""

import shutil
from pathlib import Path

from benchmarks import commands
from benchmarks.conversions import US, Setting, profile, times
from benchmarks.measure import Results, run, take_turns, warm
from benchmarks.page import Section, Target, mebibytes, others, results_table
from benchmarks.sources import TOKENIZER, llama, source_bytes
from tests import llama_cpp
from tests.peers import CONVERTER

PEER = "convert_hf_to_gguf.py + llama-quantize"
LADDER = ["Q2_K", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"]
LIMIT = 800 * 2**20
COMPILE_SECONDS = 20


def q4_k_m(setting: Setting) -> Section:
    """One checkpoint to Q4_K_M, what most people ask for."""
    section = Section("gguf:Q4_K_M")
    if not ready(section):
        return section
    source = _source(setting)
    read = source_bytes(source)
    results = _against_peer(setting, source, ["Q4_K_M"], setting.repeats(3))
    costs, sentence = profile(setting, source, ["gguf:Q4_K_M"])
    shutil.rmtree(source)
    cpu = results.cpu(PEER) / results.cpu(US)
    section.targets.append(
        Target(
            "gguf:Q4_K_M against convert_hf_to_gguf.py + llama-quantize, CPU seconds",
            ">= 6x",
            f"{cpu:.1f}x; time {_speed(results)}",
            cpu >= 6,
            sentence,
        )
    )
    section.blocks += [
        f"A Llama of {read / 2e9:.2f}B weights ({read / 1e9:.2f} GB) with tied embeddings and Llama 3's tokenizer. "
        f"llama.cpp's way writes a BF16 GGUF of {_intermediate(results, US) / 1e9:.2f} GB and reads it again; {US} "
        f"writes no intermediate file. llama-quantize is llama.cpp {llama_cpp.RELEASE}, Release, a thread per core.",
        results_table(results, US, read),
        others(results),
        costs,
    ]
    return section


def ladder(setting: Setting) -> Section:
    """Nine file types in one command, and what their kernels take to compile."""
    section = Section("The ladder of file types from one read")
    if not ready(section):
        return section
    source = _source(setting)
    read = source_bytes(source)
    results = _against_peer(setting, source, LADDER, 1)
    costs, sentence = profile(setting, source, _variants(LADDER))
    shutil.rmtree(source)
    speed, peak = results.wall(PEER) / results.wall(US), results.resident(US)
    compiled, compiled_cpu = _compile_seconds(setting)
    section.targets += [
        Target(
            f"{len(LADDER)} file types in one command against convert_hf_to_gguf.py + {len(LADDER)} llama-quantize",
            ">= 8x",
            f"{_speed(results)}; CPU {results.cpu(PEER) / results.cpu(US):.1f}x",
            speed >= 8,
            sentence,
        ),
        Target("peak memory of the ladder", "<= 800 MiB", f"{mebibytes(peak)} MiB", peak <= LIMIT),
        Target(
            "compilation of the ladder's kernels, at the first run on a machine",
            f"< {COMPILE_SECONDS} s",
            f"{compiled:.1f} s, {compiled_cpu:.1f} CPU s",
            compiled < COMPILE_SECONDS,
            "Numba and LLVM compile each kernel once; later runs load the machine code.",
        ),
    ]
    section.blocks += [
        f"The same checkpoint to {', '.join(LADDER)}: one command against the converter and {len(LADDER)} runs of "
        f"llama-quantize on its BF16 GGUF. Of {PEER} there is one run.",
        results_table(results, US, read),
        others(results),
        f"Compilation: a checkpoint of one small layer takes {compiled:.1f} s longer with empty caches than with warm "
        "ones.",
        costs,
    ]
    return section


def ready(section: Section) -> bool:
    """Whether both sides can run; if not, the section says what is missing."""
    missing = []
    if not TOKENIZER.is_dir():
        missing.append(f"{TOKENIZER} (STREAMQUANT_DATA)")
    if not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        missing.append(f"{CONVERTER} (STREAMQUANT_PEERS)")
    try:
        llama_cpp.build()
    except llama_cpp.CannotBuildError as error:
        missing.append(f"llama-quantize ({error})")
    if missing:
        section.blocks.append(f"Not run: it needs {', '.join(missing)}.")
    return not missing


def _source(setting: Setting) -> Path:
    layers, width = (2, 512) if setting.quick else (8, 2048)
    return llama(setting.work / "llama", layers, width=width, tokenizer=True)


def _variants(file_types: list[str]) -> list[str]:
    return [f"gguf:{','.join(file_types)}"]


def _against_peer(setting: Setting, source: Path, file_types: list[str], peer_repeats: int) -> Results:
    warm(source)
    ours = commands.streamquant(US, source, _variants(file_types), setting.work / "out")
    theirs = commands.quantizer(PEER, source, file_types, setting.work / "peer", peer_repeats)
    run(ours, setting.log)  # untimed: compiles kernels that were changed since
    return take_turns([ours, theirs], setting.repeats(3), setting.log)


def _speed(results: Results) -> str:
    return times(results.wall(PEER) / results.wall(US), results.ratios(PEER, US))


def _intermediate(results: Results, us: str) -> int:
    """Bytes of the 16-bit GGUF: what the peer writes more than we do."""
    return results.best(PEER).written - results.best(us).written


def _compile_seconds(setting: Setting) -> tuple[float, float]:
    """How much longer a conversion takes that finds no compiled kernel: seconds and CPU seconds."""
    source = llama(setting.work / "small", 1, width=256, tokenizer=True)
    warm(source)
    out = setting.work / "out"
    contenders = [
        commands.streamquant("small", source, _variants(LADDER), out),
        commands.first_run("small, first run", source, _variants(LADDER), out, setting.work / "empty"),
    ]
    run(contenders[0], setting.log)
    results = take_turns(contenders, 1, setting.log)
    shutil.rmtree(source)
    first, later = results.best("small, first run"), results.best("small")
    return first.wall - later.wall, first.cpu - later.cpu
