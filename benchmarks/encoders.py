"""The kernels' section of the page; benchmarks.kernels measures."""

import json

from benchmarks import commands
from benchmarks.conversions import Setting
from benchmarks.kernels import SHAPE
from benchmarks.measure import run
from benchmarks.page import Section, Target, table

REQUIRED = {
    **dict.fromkeys(("Q2_K", "Q4_K", "Q5_K", "IQ4_XS", "IQ4_NL"), 8.0),
    "Q6_K": 5.0,
    "Q3_K": 3.0,
    "Q8_0": 1.5,
    "Q4_0": 1.5,
}
"""How many times faster than ggml an encoder has to be."""


def encoders(setting: Setting) -> Section:
    """Weights per second and core of every encoder."""
    report = setting.work / "kernels.json"
    sample = run(commands.kernels(report, 0.2 if setting.quick else 3.0), setting.log)
    found = json.loads(report.read_text())
    section = Section("Kernels")
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
        if ggml and result["name"] in REQUIRED:
            section.targets.append(_target(result["name"], min(ggml) / min(ours)))
        rows.append(row)
    section.blocks += [
        f"Million weights per second of one core, float32[{SHAPE[0]}, {SHAPE[1]}] in memory to bytes in memory, one "
        "thread, CPU seconds of that thread, in turns with `ggml_quantize_chunk` of the wheel xllamacpp, best of as "
        "many as fit into three seconds. The ratio is ours over ggml's, its spread the middle half of all turns. Rows "
        'with "importance" weight the columns by an importance matrix, which is another search. ggml has no FP8.',
        table(["", "streamquant", "ggml", "ratio", "spread", "same bytes"], rows),
        f"Other processes took {sample.others:.0%} of the machine's cores meanwhile.",
    ]
    return section


def _target(name: str, ratio: float) -> Target:
    required = REQUIRED[name]
    what = f"{name} of one core against ggml_quantize_chunk"
    why = "the search's chain of single-precision operations is ggml's own, one after another in each lane"
    return Target(what, f">= {required:g}x", f"{ratio:.1f}x", ratio >= required, why)
