"""Plots of a report, by matplotlib: the same report gives the same bytes.

Each is drawn once for files (SVG and PNG, dark on white) and once for the page, where colours are CSS variables that
follow light and dark, and text is text. Figures are as wide as a phone, so that their text is legible there.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from streamquant.validate.report.data import Report

WIDTH, HEIGHT = 4.4, 3.1
"""Inches of 72 points."""
FONT_SIZE = 9.5
DPI = 200
HASH_SALT = "streamquant"

INK, SOFT, LINE, PAPER = "#1b1f24", "#5c6570", "#d5d9de", "#ffffff"
SERIES = ("#2563b0", "#c2500c", "#12805c", "#a12f7d", "#7a6500", "#6247c4", "#0c7f92", "#b3352f")
"""Colours of variants, in the order of the report; after the last come dashes, then dots."""
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", PAPER: "--card"} | {
    colour: f"--s{number}" for number, colour in enumerate(SERIES)
}
"""Colour -> CSS variable of the page."""
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^")
LEAST = 1e-9
"""Nats; what is drawn in place of smaller divergences, zero included, where an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot: name of its files, heading, one sentence on how to read it, and text for those who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    page_svg: str
    """For the page: no XML prolog, colours by CSS variables, ids of its own."""
    file_svg: bytes
    png: bytes


@dataclass(frozen=True, slots=True)
class _Series:
    """A variant in the plots."""

    name: str
    number: int

    @property
    def style(self) -> dict[str, Any]:
        return {"color": SERIES[self.number % len(SERIES)], "linestyle": _pick(DASHES, self.number)}

    @property
    def marker(self) -> str:
        return _pick(MARKERS, self.number)


def _pick(choices: Sequence[str], number: int) -> str:
    return choices[number // len(SERIES) % len(choices)]


def make_plots(report: "Report", names: Sequence[str]) -> list[Plot]:
    """All plots that the report has data for; names are those of the variants, as the report shows them."""
    variants = [
        (_Series(_plain(name), number), found)
        for number, (name, variant) in enumerate(zip(names, report.variants, strict=True))
        if (found := report.measured(variant)) is not None
    ]
    if not variants:
        return []
    tall = HEIGHT + _legend_height([_short(series.name, 30) for series, _ in variants])
    return [
        _plot(
            "size-kld", "Size against divergence",
            "Lower left is better. The line joins the variants that no other one beats in both; bars are the standard "
            "error by chunk.",
            f"Size and mean KL divergence of {len(variants)} variants; the numbers are in the table.",
            lambda axes: _draw_sizes(axes, report, variants),
        ),
        _plot(
            "kld-histogram", "Divergence of single tokens",
            "Share of the tokens at each KL divergence: a long right tail is a variant that is mostly right and "
            "sometimes far off.",
            "Histograms of the KL divergence per token; the percentiles are in the table of divergence.",
            lambda axes: _draw_histograms(axes, variants),
            height=tall,
        ),
        _plot(
            "layers", "Error by layer",
            "Relative error of the hidden state after each layer; -1 is the embeddings. A step marks a layer that "
            "adds more than its share.",
            "Relative error of the hidden state by layer.",
            lambda axes: _draw_layers(axes, report, variants),
            height=tall,
        ),
        _plot(
            "delta-p", "Change in the probability of the right token",
            "Percentiles over tokens: thick 25 to 75, medium 5 to 95, thin 1 to 99, the dot is the mean. Left of zero "
            "the variant is less sure.",
            "Percentiles of the change of the probability of the token that follows; the numbers are in the table.",
            lambda axes: _draw_delta_p(axes, variants),
            height=max(1.5, 0.36 * len(variants) + 0.9),
        ),
    ]  # fmt: skip


# What is drawn


Measured = list[tuple[_Series, Any]]
"""Each variant with its VariantResult."""


def _draw_sizes(axes: "Axes", report: "Report", variants: Measured) -> None:
    sizes = [result.model.nbytes for _, result in variants]
    unit, scale = ("GB", 1e9) if max(sizes) >= 1e9 else ("MB", 1e6)
    klds = [max(result.overall.kld.value, LEAST) for _, result in variants]
    line = pareto(list(zip(sizes, klds, strict=True)))
    axes.plot([sizes[at] / scale for at in line], [klds[at] for at in line], color=LINE, linewidth=1.6, zorder=1)
    _floor(axes, report, lambda floor: floor.overall.kld.value)
    for (series, result), size, kld in zip(variants, sizes, klds, strict=True):
        error = result.overall.kld.error_by_chunk or 0.0
        low = min(error, kld - LEAST)  # an axis that is logarithmic has no zero
        axes.errorbar(
            size / scale, kld, yerr=[[max(low, 0.0)], [error]], fmt=series.marker, color=series.style["color"],
            markersize=5.5, elinewidth=1, zorder=3,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel(f"size, {unit}")
    axes.set_ylabel("mean KLD, nats per token")
    _label_points(axes, [(size / scale, kld, series.name) for (series, _), size, kld in
                         zip(variants, sizes, klds, strict=True)])  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates, by the first.

    >>> pareto([(1, 9), (2, 3), (3, 4), (4, 1)])
    [0, 1, 3]
    """
    best, found = math.inf, []
    for at in sorted(range(len(points)), key=lambda at: (points[at], at)):
        if points[at][1] < best:
            best = points[at][1]
            found.append(at)
    return found


def _label_points(axes: "Axes", points: list[tuple[float, float, str]]) -> None:
    """Names beside their points, left of those in the right half; names that would lie on another go up or down."""
    left, right = axes.get_xlim()
    taken: list[tuple[float, float, bool]] = []
    for x, y, name in sorted(points, key=lambda point: (-point[1], point[0], point[2])):
        on_left = x > (left + right) / 2
        shift = 0.0
        height = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        while shift > -60 and any(side == on_left and abs(height + shift - other) < 11 for _, other, side in taken):
            shift -= 3.0
        taken.append((x, height + shift, on_left))
        axes.annotate(
            _short(name, 26), (x, y), xytext=(-7 if on_left else 7, shift), textcoords="offset points",
            ha="right" if on_left else "left", va="center", fontsize=FONT_SIZE, color=INK,
        ).set_in_layout(False)  # fmt: skip


def _floor(axes: "Axes", report: "Report", value: Callable[[Any], float]) -> None:
    """A dashed line at the noise of the original against itself."""
    for floor in report.comparison.noise_floors:
        at = value(floor)
        if at >= LEAST:
            axes.axhline(at, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
            what = "other dtype" if floor.kind == "dtype" else "other batches"
            axes.annotate(
                f"noise floor, {what}", (0.99, at), xycoords=("axes fraction", "data"), xytext=(0, 2),
                textcoords="offset points", ha="right", va="bottom", fontsize=FONT_SIZE - 1.5, color=SOFT,
            )  # fmt: skip


def _draw_histograms(axes: "Axes", variants: Measured) -> None:
    for series, result in variants:
        histogram = result.overall.kld_histogram
        total = max(1, sum(histogram.counts))
        shares = [100 * count / total for count in histogram.counts]
        axes.stairs(shares, [10**edge for edge in histogram.edges], label=series.name, linewidth=1.4, **series.style)
    axes.set_xscale("log")
    seen = [
        10**edge
        for _, result in variants
        for edge, count in zip(result.overall.kld_histogram.edges, result.overall.kld_histogram.counts, strict=False)
        if count
    ]
    axes.set_xlim(max(min(seen) / 2, LEAST), max(seen) * 3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KLD of a token, nats")
    axes.set_ylabel("share of tokens, %")
    _legend(axes)


def _draw_layers(axes: "Axes", report: "Report", variants: Measured) -> None:
    from matplotlib.ticker import MaxNLocator

    for series, result in variants:
        errors = [(layer.layer, 100 * layer.relative_error) for layer in result.layers if layer.relative_error > LEAST]
        if errors:
            axes.plot(*zip(*errors, strict=True), label=series.name, linewidth=1.4, **series.style)
    for floor in report.comparison.noise_floors:
        errors = [(layer.layer, 100 * layer.relative_error) for layer in floor.layers if layer.relative_error > LEAST]
        if errors:
            what = "other dtype" if floor.kind == "dtype" else "other batches"
            axes.plot(*zip(*errors, strict=True), label=f"noise floor, {what}", color=SOFT, linewidth=0.9,
                      linestyle=(0, (4, 3)))  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _draw_delta_p(axes: "Axes", variants: Measured) -> None:
    reach = 0.0
    for row, (series, result) in enumerate(variants):
        found, colour = result.overall.delta_p_percentiles, series.style["color"]
        spans = ((found.p1, found.p99, 1.2), (found.p5, found.p95, 3.2), (found.p25, found.p75, 7.5))
        for low, high, width in spans:
            axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=width, solid_capstyle="butt")
            reach = max(reach, abs(100 * low), abs(100 * high))
        mean = 100 * result.overall.delta_p.value
        axes.plot([mean], [row], "o", color=PAPER, markeredgecolor=colour, markersize=4.5, zorder=4)
    axes.axvline(0, color=SOFT, linewidth=0.8, zorder=0)
    reach = max(reach, 0.01) * 1.08
    axes.set_xlim(-reach, reach)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_yticks(range(len(variants)), [_short(series.name, 18) for series, _ in variants])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("change of probability, percentage points")


def _legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    shown = [_short(label, 30) for label in labels]
    axes.legend(
        handles, shown, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=_columns(shown), frameon=False,
        fontsize=FONT_SIZE - 0.5, handlelength=1.4, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _columns(labels: Sequence[str]) -> int:
    """Columns of a legend that are as wide as the figure together, at most."""
    most = max(1, min(3, len(labels), 58 // (max(map(len, labels)) + 6)))
    return 2 if most == 3 and len(labels) == 4 else most


def _legend_height(names: Sequence[str]) -> float:
    """Inches that a legend needs beyond its first two rows."""
    return 0.18 * max(0, -(-(len(names) + 1) // _columns(names)) - 2)


# How it is drawn


def _plot(
    name: str, title: str, caption: str, alt: str, draw: "Callable[[Axes], None]", height: float = HEIGHT
) -> Plot:
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": HASH_SALT, "font.size": FONT_SIZE, "font.family": ["DejaVu Sans"],
        "text.color": INK, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": LINE,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.facecolor": "none",
        "figure.facecolor": PAPER, "xtick.major.size": 3, "ytick.major.size": 0, "ytick.minor.size": 0,
        "xtick.minor.size": 0, "legend.labelcolor": INK, "axes.formatter.use_mathtext": False, "path.simplify": False,
        "axes.unicode_minus": True, "savefig.dpi": DPI, "text.usetex": False, "text.parse_math": False,
    }  # fmt: skip
    with warnings.catch_warnings(), matplotlib.rc_context({**dict(matplotlib.rcParamsDefault), **settings}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = _figure(draw, height)
        svg, png = io.BytesIO(), io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        figure.savefig(png, format="png", metadata={"Software": None})
    text = svg.getvalue().decode()
    return Plot(name, title, caption, alt, page_svg(text, name), text.encode(), png.getvalue())


def _figure(draw: "Callable[[Axes], None]", height: float) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(WIDTH, height), layout="constrained")  # no pyplot: no global state, no display
    axes = figure.add_subplot()
    axes.margins(x=0.03)
    draw(axes)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    return figure


def page_svg(svg: str, name: str) -> str:
    """An SVG of matplotlib for use inside a page: colours as CSS variables, the page's font, ids with a prefix."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", body)
    return re.sub(r'<svg([^>]*?) (?:width|height)="[\d.]+pt"([^>]*?) (?:width|height)="[\d.]+pt"', r"<svg\1\2", body)


def _plain(name: str) -> str:
    """A name without characters that XML does not have."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
