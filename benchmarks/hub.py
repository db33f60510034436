"""A conversion whose source comes from a Hub on loopback against the same conversion of a folder."""

import dataclasses
import shutil
from pathlib import Path

from benchmarks import commands
from benchmarks.conversions import US, Setting, profile
from benchmarks.measure import Contender, Results, run, take_turns, warm
from benchmarks.page import Section, Target, mebibytes, others, results_table
from benchmarks.sources import TOKENIZER, llama, source_bytes
from streamquant.convert.source.spool import DEFAULT_SHARDS
from tests.hub import HubProcess

REPO = "ORG/Llama"
ROAD = ["fp8-dynamic", "gguf:Q8_0", "gguf:Q6_K", "gguf:Q4_K_M"]
"""The variants of the plan in the README: what one read of a large model is for."""
LEAST = 0.8


def hub(setting: Setting) -> Section:
    """The network stage overlaps: fetching, checking and deleting shards cost little beside the conversion."""
    section = Section("From the Hub")
    if not TOKENIZER.is_dir():
        section.blocks.append(f"Not run: it needs {TOKENIZER} (STREAMQUANT_DATA).")
        return section
    layers, width, shards = (2, 1024, 4) if setting.quick else (20, 2048, 20)
    root = setting.work / "hub"
    source = llama(root / REPO, layers, width=width, tokenizer=True, shards=shards)
    read = source_bytes(source)
    warm(source)
    with HubProcess(root) as server:
        for variants, repeats in ((ROAD, 2), (["fp8-dynamic"], 3)):
            local, remote = _contenders(setting, server, source, variants)
            for contender in (local, remote):  # untimed: kernels are compiled, the Hub hashes its files
                run(contender, setting.log)
            results = take_turns([local, remote], setting.repeats(repeats), setting.log)
            _add(section, results, variants, read, profile(setting, source, variants)[1])
    section.blocks.insert(
        0,
        f"A Llama of {read / 2e9:.2f}B weights in {shards} shards of {read / shards / 1e6:.0f} MB, from a test Hub in "
        "a process of its own on the same machine, whose CPU time is among the others', by the unmodified "
        f"huggingface_hub over HTTP (no xet), with the default spool of {DEFAULT_SHARDS} shards. Every shard is "
        "written to the spool, checked against its SHA-256, converted, deleted; of a folder the same hash is computed "
        "while it is converted. The first shard has to be there before anything can be converted, which weighs less "
        "the more shards there are. On so few cores the client's own work, more than a CPU second a GB, is not beside "
        "the conversion but instead of it.",
    )
    shutil.rmtree(root)
    return section


def _contenders(setting: Setting, server: HubProcess, source: Path, variants: list[str]) -> tuple[Contender, Contender]:
    """The same command on the folder and on the Hub; both with the same caches."""
    out = setting.work / "out"
    cache = {"XDG_CACHE_HOME": str(setting.work / "cache"), "HF_HUB_OFFLINE": "0"}
    local = commands.streamquant(US, source, variants, out)
    remote = commands.streamquant(f"{US}, from the Hub", Path(REPO), variants, out)
    environment = {**cache, **server.environment(setting.work / "home")}
    return (
        dataclasses.replace(local, environment=cache),
        dataclasses.replace(remote, environment=environment),
    )


def _add(section: Section, results: Results, variants: list[str], read: int, sentence: str) -> None:
    """Targets and table of one comparison."""
    local, remote = results.samples
    share = results.wall(local) / results.wall(remote)
    section.targets.append(
        Target(
            f"source from a loopback Hub, throughput of the local one's: {', '.join(variants)}",
            f">= {LEAST:.0%}",
            f"{share:.0%} ({_rounds(results, local, remote)}); "
            f"{mebibytes(results.resident(remote))} MiB in place of {mebibytes(results.resident(local))}",
            share >= LEAST,
            sentence,
        )
    )
    section.blocks += [f"To {', '.join(variants)}:", results_table(results, local, read), others(results)]


def _rounds(results: Results, local: str, remote: str) -> str:
    ratios = results.ratios(local, remote)
    return f"{min(ratios):.0%} to {max(ratios):.0%} by round"
