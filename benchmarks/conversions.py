"""Whole conversions against whole conversions: FP8, Q8_0, and five variants in one command."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import commands
from benchmarks.measure import Contender, Results, run, take_turns, warm
from benchmarks.page import Section, Target, others, results_table, table
from benchmarks.sources import TOKENIZER, llama, source_bytes
from tests.peers import CONVERTER

US = "streamquant"
FIVE = ["fp8-dynamic", "fp8-block", "gguf:BF16", "gguf:Q8_0", "gguf:Q4_0"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a run keeps its files, and whether it is only to show that everything works."""

    work: Path
    quick: bool

    @property
    def log(self) -> Path:
        """Output of the command that ran last."""
        return self.work / "log.txt"

    def repeats(self, full: int) -> int:
        """How often to run each contender."""
        return 1 if self.quick else full


@dataclass(frozen=True, slots=True)
class Pair:
    """The same comparison on a small and a large checkpoint."""

    small: Results
    large: Results
    small_bytes: int
    large_bytes: int

    def steady(self, name: str) -> float:
        """Source bytes per second between the two sizes: constant costs cancel out."""
        noise = max(results.longest(name) - results.wall(name) for results in (self.small, self.large))
        seconds = self.large.wall(name) - self.small.wall(name)
        return self._rate(seconds if seconds > noise else 0.0)

    def steady_cpu(self, name: str) -> float:
        """The same per CPU second."""
        return self._rate(self.large.cpu(name) - self.small.cpu(name))

    def _rate(self, seconds: float) -> float:
        """nan where the difference of the sizes is lost in the noise of the machine."""
        return (self.large_bytes - self.small_bytes) / seconds if seconds > 0 else math.nan

    def steady_table(self, peer: str) -> str:
        """Steady rates of all contenders that ran on both sizes, with constant costs."""
        rows = []
        for name in self.large.samples:
            rate = self.steady(name)
            constant = self.small.wall(name) - self.small_bytes / rate
            rows.append(
                [
                    name,
                    f"{self.small.wall(name):.2f}",
                    f"{self.large.wall(name):.2f}",
                    f"{rate / 1e6:,.0f}",
                    f"{self.steady_cpu(name) / 1e6:,.0f}",
                    f"{constant:.1f}",
                ]
            )
        text = table(
            ["", "s (small)", "s (large)", "steady MB/s", "steady MB/CPU s", "constant s"],
            rows,
        )
        return (
            f"Steady rate: from {self.small_bytes / 1e9:.2f} GB to {self.large_bytes / 1e9:.2f} GB of source, "
            "difference of bytes over difference of times (nan: lost in the noise); "
            f"{US} over {peer} is {_or_noise(self.steady(US) / self.steady(peer))}, "
            f"per CPU second {_or_noise(self.steady_cpu(US) / self.steady_cpu(peer))}."
            f"\n\n{text}"
        )


def _compare(
    setting: Setting,
    make: Callable[[int], Path],
    layers: tuple[int, int],
    contenders: Callable[[Path, bool], list[Contender]],
    repeats: tuple[int, int],
) -> Pair:
    """Run the contenders on a small and on a large checkpoint. The small one stays for the profile."""
    small, large = make(layers[0]), make(layers[1])
    results = []
    for index, source in enumerate((small, large)):
        warm(source)
        list_ = contenders(source, index == 0)
        run(list_[0], setting.log)  # untimed: compiles kernels that were changed since
        results.append(take_turns(list_, setting.repeats(repeats[index]), setting.log))
    pair = Pair(results[0], results[1], source_bytes(small), source_bytes(large))
    shutil.rmtree(large)
    return pair


def profile(setting: Setting, source: Path, variants: list[str]) -> tuple[str, str]:
    """(table of CPU seconds by function, one sentence of the largest) for one conversion."""
    report = setting.work / "profile.json"
    run(commands.profiled(source, variants, setting.work / "profile", report), setting.log)
    found = json.loads(report.read_text())
    total = sum(found["seconds"].values())
    ranked = sorted(found["seconds"].items(), key=lambda item: -item[1])
    rows = [[f"`{name}`", f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in ranked[:10]]
    rest = sum(seconds for _, seconds in ranked[10:])
    rows.append([f"{len(ranked[10:])} others", f"{rest:.2f}", f"{rest / total:.0%}"])
    text = (
        f"Where {US}'s CPU seconds go ({total:.1f} of them in a run of {found['wall']:.1f} s; of these "
        f"{found['garbage']:.2f} s in Python's garbage collector, wherever it struck):\n\n" + table(["", "s", ""], rows)
    )
    largest = ", ".join(f"`{name.rpartition(' ')[2]}` {seconds / total:.0%}" for name, seconds in ranked[:5])
    return text, f"of {total:.1f} CPU seconds ({found['wall']:.1f} s) in a profiled run: {largest}."


def times(ratio: float, ratios: list[float]) -> str:
    """A ratio, and how far it goes from round to round."""
    return f"{ratio:.1f}x ({min(ratios):.1f} to {max(ratios):.1f} by round)"


def _or_noise(ratio: float) -> str:
    return "lost in the noise" if math.isnan(ratio) else f"{ratio:.1f}x"


def _cpu_ratio(pair: Pair, peer: str) -> str:
    small = pair.small.cpu(peer) / pair.small.cpu(US)
    large = pair.large.cpu(peer) / pair.large.cpu(US)
    return f"{small:.1f}x and {large:.1f}x"


def fp8(setting: Setting) -> Section:
    """fp8-dynamic against llm-compressor, and against cp."""
    peer, cp = "llm-compressor", "cp -r"
    durable, coreutils = "cp -r, fsync, SHA-256 of both (OpenSSL)", "cp -r, sha256sum of both"
    out = setting.work / "out"

    def contenders(source: Path, small: bool) -> list[Contender]:
        list_ = [
            commands.streamquant(US, source, ["fp8-dynamic"], out),
            commands.llm_compressor(peer, source, out),
            commands.copy(cp, source, out),
            commands.copy_durably_hashed(durable, source, out),
        ]
        if small:
            list_ += [
                commands.copy_sha256sum(coreutils, source, out),
                commands.first_run(f"{US}, first run", source, ["fp8-dynamic"], out, setting.work / "empty"),
            ]
        return list_

    layers, width = ((2, 4), 1024) if setting.quick else ((8, 20), 2048)
    pair = _compare(
        setting,
        lambda count: llama(setting.work / f"llama-{count}", count, width=width),
        layers,
        contenders,
        (3, 2),
    )
    small, large = pair.small, pair.large
    costs, sentence = profile(setting, setting.work / f"llama-{layers[0]}", ["fp8-dynamic"])
    shutil.rmtree(setting.work / f"llama-{layers[0]}")
    section = Section("fp8-dynamic")
    speed = small.wall(peer) / small.wall(US)
    section.targets.append(
        Target(
            "fp8-dynamic against llm-compressor's model_free_ptq",
            ">= 8x",
            f"{times(speed, small.ratios(peer, US))}; on {pair.large_bytes / 1e9:.1f} GB "
            f"{times(large.wall(peer) / large.wall(US), large.ratios(peer, US))}; "
            f"per CPU second {_cpu_ratio(pair, peer)}",
            speed >= 8,
            sentence,
        )
    )
    share = small.wall(cp) / small.wall(US)
    share_large = large.wall(cp) / large.wall(US)
    fair = small.wall(durable) / small.wall(US)
    section.targets.append(
        Target(
            "fp8-dynamic's throughput, of `cp -r`'s",
            ">= 60%",
            f"{share:.0%} ({share_large:.0%} on {pair.large_bytes / 1e9:.1f} GB, "
            f"steady {pair.steady(US) / pair.steady(cp):.0%}); "
            f"{fair:.0%} of cp with fsync and SHA-256, steady {pair.steady(US) / pair.steady(durable):.0%}",
            share >= 0.6,
            "`cp` neither hashes, nor syncs, nor computes, and has no start-up: " + sentence,
        )
    )
    section.blocks += [
        f"A Llama of {pair.small_bytes / 2e9:.2f}B weights in three shards. llm-compressor runs `model_free_ptq` with "
        "`FP8_DYNAMIC`, `lm_head` and `model.embed_tokens` ignored, a worker per core. `cp -r` copies the same folder; "
        f"it writes all of its bytes, {US} about half of them. {US} also fsyncs what it wrote and computes the SHA-256 "
        "of every byte that it reads and writes, hence the second row of cp. The third is what `sha256sum` of "
        "coreutils costs, which may not use the CPU's SHA instructions: it says little about us.",
        results_table(small, US, pair.small_bytes),
        f"On the large one, {pair.large_bytes / 1e9:.2f} GB:",
        results_table(large, US, pair.large_bytes),
        pair.steady_table(peer),
        f"{others(small)} (small; large: {large.others:.0%}.)",
        costs,
    ]
    return section


def gguf(setting: Setting) -> Section:
    """gguf:Q8_0 against llama.cpp's converter."""
    section = Section("gguf:Q8_0")
    if not TOKENIZER.is_dir() or not (CONVERTER / "convert_hf_to_gguf.py").is_file():
        section.blocks.append(f"Not run: it needs {TOKENIZER} (STREAMQUANT_DATA) and {CONVERTER} (STREAMQUANT_PEERS).")
        return section
    peer = "convert_hf_to_gguf.py"
    out = setting.work / "out"

    def contenders(source: Path, small: bool) -> list[Contender]:
        list_ = [
            commands.streamquant(US, source, ["gguf:Q8_0"], out),
            commands.converter(peer, source, setting.work / "peer.gguf"),
        ]
        if small:
            list_.append(commands.first_run(f"{US}, first run", source, ["gguf:Q8_0"], out, setting.work / "empty"))
        return list_

    layers, width = ((2, 4), 1024) if setting.quick else ((8, 24), 2048)
    pair = _compare(
        setting,
        lambda count: llama(setting.work / f"llama-{count}", count, width=width, tokenizer=True),
        layers,
        contenders,
        (3, 2),
    )
    costs, sentence = profile(setting, setting.work / f"llama-{layers[0]}", ["gguf:Q8_0"])
    shutil.rmtree(setting.work / f"llama-{layers[0]}")
    small, large = pair.small, pair.large
    speed, speed_large = small.wall(peer) / small.wall(US), large.wall(peer) / large.wall(US)
    section.targets.append(
        Target(
            "gguf:Q8_0 against convert_hf_to_gguf.py",
            ">= 4x",
            f"{times(speed, small.ratios(peer, US))}; on {pair.large_bytes / 1e9:.1f} GB "
            f"{times(speed_large, large.ratios(peer, US))}; steady {_or_noise(pair.steady(US) / pair.steady(peer))}; "
            f"per CPU second {_cpu_ratio(pair, peer)}",
            speed >= 4,
            sentence,
        )
    )
    section.blocks += [
        f"A Llama of {pair.small_bytes / 2e9:.2f}B weights with tied embeddings and Llama 3's tokenizer of 128256 "
        f"tokens; `convert_hf_to_gguf.py --outtype q8_0`. Only {US} computes hashes.",
        results_table(small, US, pair.small_bytes),
        f"On the large one, {pair.large_bytes / 1e9:.2f} GB:",
        results_table(large, US, pair.large_bytes),
        pair.steady_table(peer),
        f"{others(small)} (small; large: {large.others:.0%}.)",
        costs,
    ]
    return section


def one_pass(setting: Setting) -> Section:
    """Five variants in one command against five commands."""
    section = Section("Five variants from one read")
    if not TOKENIZER.is_dir():
        section.blocks.append(f"Not run: it needs {TOKENIZER} (STREAMQUANT_DATA).")
        return section
    layers, width = (2, 1024) if setting.quick else (8, 2048)
    source = llama(setting.work / "llama", layers, width=width, tokenizer=True)
    warm(source)
    out, together = setting.work / "out", "all five"
    contenders = [commands.streamquant(together, source, FIVE, out)]
    contenders += [commands.streamquant(variant, source, [variant], out) for variant in FIVE]
    run(contenders[0], setting.log)
    results = take_turns(contenders, setting.repeats(3), setting.log)
    costs, sentence = profile(setting, source, FIVE)
    read = source_bytes(source)
    shutil.rmtree(source)
    alone = sum(results.wall(variant) for variant in FIVE)
    share = results.wall(together) / alone
    cpu = results.cpu(together) / sum(results.cpu(variant) for variant in FIVE)
    rounds = [
        results.samples[together][i].wall / sum(results.samples[variant][i].wall for variant in FIVE)
        for i in range(len(results.samples[together]))
    ]
    section.targets.append(
        Target(
            "five variants in one command, of the time of five commands",
            "<= 60%",
            f"{share:.0%} ({min(rounds):.0%} to {max(rounds):.0%} by round), CPU {cpu:.0%}",
            share <= 0.6,
            f"not shared is encoding, writing and hashing of {results.best(together).written / 1e9:.1f} GB; {sentence}",
        )
    )
    section.blocks += [
        f"A Llama of {read / 2e9:.2f}B weights with Llama 3's tokenizer. One read of the source, one SHA-256 of it, "
        f"one start-up; the five commands alone take {alone:.1f} s together. The share compares the best runs, which "
        "may have met different loads; in a round, all six ran one after the other.",
        results_table(results, together, read),
        others(results),
        costs,
    ]
    return section
