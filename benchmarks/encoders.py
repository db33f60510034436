"""The kernels' section of the page; benchmarks.kernels measures."""

import json

from benchmarks import commands
from benchmarks.conversions import Setting
from benchmarks.kernels import SHAPE
from benchmarks.measure import run
from benchmarks.page import Section, table


def encoders(setting: Setting) -> Section:
    """Weights per second and core of every encoder."""
    report = setting.work / "kernels.json"
    sample = run(commands.kernels(report, 0.2 if setting.quick else 3.0), setting.log)
    found = json.loads(report.read_text())
    rows = []
    for result in found["results"]:
        ours, ggml = result["ours"], result["ggml"]
        fastest = found["weights"] / min(ours) / 1e6
        row = [result["name"], f"{fastest:,.0f}", "", "", "", ""]
        if ggml:
            ratios = sorted(b / a for a, b in zip(ours, ggml, strict=True))
            row[2] = f"{found['weights'] / min(ggml) / 1e6:,.0f}"
            row[3] = f"{min(ggml) / min(ours):.2f}"
            row[4] = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-len(ratios) // 4 - 1]:.2f}"
            row[5] = "yes" if result["same"] else "**no**"
        rows.append(row)
    section = Section("Kernels")
    section.blocks += [
        f"Million weights per second of one core, float32[{SHAPE[0]}, {SHAPE[1]}] in memory to bytes in memory, one "
        "thread, CPU seconds of that thread, in turns with `ggml_quantize_chunk` of the wheel xllamacpp, best of as "
        "many as fit into three seconds. The ratio is ours over ggml's, its spread the middle half of all turns. ggml "
        "has no FP8.",
        table(["", "streamquant", "ggml", "ratio", "spread", "same bytes"], rows),
        f"Other processes took {sample.others:.0%} of the machine's cores meanwhile.",
    ]
    return section
