"""report.json -> report.md, report.html and plots/. The same JSON gives the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from streamquant.files.writing import explain, make_folder, write_atomically
from streamquant.quant.printable import visible
from streamquant.validate.report.plots import Plot, make_plots
from streamquant.validate.report.text import code, markdown
from streamquant.validate.report.view import HELPERS, make_view

if TYPE_CHECKING:
    from streamquant.validate.report.data import Report

PLOTS = "plots"


def write_pages(report: "Report", folder: str | Path) -> list[Path]:
    """Write report.md, report.html and plots/*.svg, *.png; return their paths. Raises StreamquantError if it fails."""
    files, folder = make_pages(report), Path(folder)
    try:
        make_folder(folder / PLOTS, folder)
        for name, data in files.items():
            write_atomically(folder / name, data)
    except OSError as error:
        raise explain(error, folder) from error
    return [folder / name for name in files]


def make_pages(report: "Report", plots: Sequence[Plot] | None = None) -> dict[str, bytes]:
    """The same, as contents by name within the folder; `plots` if they are drawn already."""
    if plots is None:
        plots = make_plots(report, [row.name for row in make_view(report).rows])
    files = {
        "report.md": render_markdown(report, plots).encode(errors="replace"),
        "report.html": render_html(report, plots).encode(errors="replace"),
    }
    for plot in plots:
        files[f"{PLOTS}/{plot.name}.svg"], files[f"{PLOTS}/{plot.name}.png"] = plot.file_svg, plot.png
    return files


def render_markdown(report: "Report", plots: Sequence[Plot]) -> str:
    """A page for a model card. Every value is escaped unless a helper made it Markdown."""
    environment = _environment(finalize=markdown)
    environment.filters |= {"code": code}
    return environment.get_template("report.md.j2").render(view=make_view(report), plots=plots, **HELPERS)


def render_html(report: "Report", plots: Sequence[Plot]) -> str:
    """One file without scripts and without network. Every value is escaped but the plots' SVG."""
    environment = _environment(autoescape=True)
    environment.filters |= {"visible": visible, "svg": _svg}
    return environment.get_template("report.html.j2").render(view=make_view(report), plots=plots, **HELPERS)


def render_summary(report: "Report") -> str:
    """The verdict and the table of variants, for a notebook: no scripts, no network, its colours those of the page.

    Every value is escaped.
    """
    environment = _environment(autoescape=True)
    environment.filters |= {"visible": visible}
    return environment.get_template("notebook.html.j2").render(view=make_view(report), **HELPERS)


def _svg(plot: Plot) -> Markup:
    return Markup(plot.page_svg)  # drawn here; names in it are escaped by matplotlib


def _environment(**settings: object) -> Environment:
    return Environment(
        loader=PackageLoader("streamquant.validate.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **settings,  # type: ignore[arg-type] # jinja2 names them one by one
    )
