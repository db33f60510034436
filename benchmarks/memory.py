"""Memory on tensors of the size of Llama 3.1 405B's: at most 800 MiB, however many layers."""

import shutil

from benchmarks import commands
from benchmarks.conversions import Setting
from benchmarks.measure import Sample, run
from benchmarks.page import Section, Target, mebibytes, table
from benchmarks.sources import TOKENIZER, huge, source_bytes

VARIANTS = ["fp8-dynamic", "fp8-block", "gguf:Q8_0", "gguf:Q4_0"]
LIMIT = 800 * 2**20
SAME = 24 * 2**20
"""Peaks that differ by no more than this are the same: allocator and page cache noise from run to run."""
NEEDED = 50e9


def memory(setting: Setting) -> Section:
    """Convert one and two layers of 405B to four variants and look at the resident memory."""
    section = Section("Memory")
    if not TOKENIZER.is_dir():
        section.blocks.append(f"Not run: it needs {TOKENIZER} (STREAMQUANT_DATA).")
        return section
    if shutil.disk_usage(setting.work).free < NEEDED and not setting.quick:
        section.blocks.append(f"Not run: it needs {NEEDED / 1e9:.0f} GB of free disk (--work).")
        return section
    rows: list[tuple[int, int, Sample]] = []
    for layers in (1, 2):
        source = huge(setting.work / "huge", layers, scale=8 if setting.quick else 1)
        try:
            contender = commands.streamquant("memory", source, VARIANTS, setting.work / "out")
            sample = run(contender, setting.log)
            rows.append((layers, source_bytes(source), sample))
            print(f"  {layers}: {sample.wall:.0f} s, {sample.resident / 2**20:.0f} MiB", flush=True)
        finally:
            shutil.rmtree(source)
    peaks = [max(sample.resident, sample.largest) for _, _, sample in rows]
    found = " and ".join(f"{mebibytes(peak)} MiB" for peak in peaks)
    section.targets += [
        Target("peak memory on 405B's matrices, 1 and 2 layers", "<= 800 MiB", found, max(peaks) <= LIMIT),
        Target("no more memory with more layers", "same", found, peaks[1] <= peaks[0] + SAME),
    ]
    section.blocks += [
        f"Layers of Llama 3.1 405B (the largest matrix is 53248 x 16384, 1.7 GB) with its embeddings (128256 x 16384, "
        f"4.2 GB, tied), but 8 heads, to {', '.join(VARIANTS)} in one command, all cores.",
        table(
            [
                "layers",
                "source GB",
                "written GB",
                "seconds",
                "CPU s",
                "peak MiB",
                "of it anonymous",
                "largest process MiB",
            ],
            [
                [
                    str(layers),
                    f"{read / 1e9:.1f}",
                    f"{sample.written / 1e9:.1f}",
                    f"{sample.wall:.0f}",
                    f"{sample.cpu:.0f}",
                    mebibytes(sample.resident),
                    mebibytes(sample.anonymous),
                    mebibytes(sample.largest),
                ]
                for layers, read, sample in rows
            ],
        ),
    ]
    return section
