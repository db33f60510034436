"""A report as it is published: without the folders of the machine that it was made on."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamquant.files.folders import real_path
from streamquant.files.records import from_json, to_json
from streamquant.files.writing import explain, make_folder, write_atomically
from streamquant.quant.errors import UsageError
from streamquant.validate.report.data import REPORT, Report, check_report_folder, report_bytes
from streamquant.validate.report.plots import Plot, make_plots
from streamquant.validate.report.render import PLOTS, make_pages
from streamquant.validate.report.view import make_view


def public_report(report: Report) -> Report:
    """The same report with names of files in place of their paths, wherever they occur.

    Variants of one name in several folders keep apart by a number in front.
    """
    longest_first = sorted(_folders(report), key=lambda text: (-len(text), text))
    folders = re.compile(rf"(?<![\w.~/-])(?:{'|'.join(map(re.escape, longest_first))})")
    record = from_json(Report, _shortened(to_json(report, "report"), folders), "report")
    names = _names([variant.path for variant in report.variants])
    results = tuple(
        replace(result, model=replace(result.model, path=names.get(old.model.path, Path(old.model.path).name)))
        for result, old in zip(record.comparison.variants, report.comparison.variants, strict=True)
    )
    original = record.comparison.original
    original = replace(original, model=replace(original.model, path=Path(original.model.path).name))
    files = tuple(replace(file, path=Path(file.path.name)) for file in record.comparison.files)
    variants = tuple(
        replace(variant, path=names[old.path]) for variant, old in zip(record.variants, report.variants, strict=True)
    )
    comparison = replace(record.comparison, variants=results, original=original, files=files)
    command = tuple(map(public_argument, report.command))
    return replace(record, command=command, comparison=comparison, variants=variants)


def public_argument(argument: str) -> str:
    """An argument of a command line with the name of a file or folder in place of its path.

    >>> [public_argument(text) for text in ("--text", "/home/me/wiki.test.raw", "--out=a/b", "--tensor-type", "a/")]
    ['--text', 'wiki.test.raw', '--out=b', '--tensor-type', 'a']
    """
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name if os.sep in value else value}"


@dataclass(frozen=True, slots=True)
class PublicReport:
    """A report as it is published."""

    report: Report
    plots: tuple[Plot, ...]
    files: Mapping[str, bytes]
    """By name within the folder: report.json, the pages, the plots."""


def make_public(report: Report) -> PublicReport:
    """Take the paths out, draw the plots, render the pages."""
    public = public_report(report)
    plots = tuple(make_plots(public, [row.name for row in make_view(public).rows]))
    return PublicReport(public, plots, {REPORT: report_bytes(public), **make_pages(public, plots)})


def write_report_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them, and remove plots of an earlier report.

    Raises UsageError if the folder holds other things than a report, StreamquantError if writing fails.
    """
    check_report_folder(folder)
    try:
        make_folder(folder / PLOTS, folder)
        for name, data in files.items():
            write_atomically(folder / name, data)
        for path in sorted((folder / PLOTS).iterdir()):
            if path.suffix in (".svg", ".png") and f"{PLOTS}/{path.name}" not in files:
                path.unlink()
    except OSError as error:
        raise explain(error, folder) from error


def refuse_old_report(folder: Path) -> None:
    """Raise UsageError if there is a report, where none is to be published."""
    if (folder / REPORT).exists():
        raise UsageError(
            "a report of other files would be published with this variant",
            where=str(folder),
            hint="validate again, or remove the folder",
        )


def _folders(report: Report) -> Iterator[str]:
    """Absolute folders of all files that the report names, to be taken out of its texts."""
    paths = [variant.path for variant in report.variants]
    paths += [result.model.path for result in report.comparison.variants]
    paths += [report.comparison.original.model.path, *(str(file.path) for file in report.comparison.files)]
    paths += [argument for argument in report.command if os.sep in argument]
    places = {str(Path.home()), str(Path.cwd())}
    places |= {parent for path in paths for parent in (str(Path(path).parent), _resolved_parent(path))}
    for place in places:
        if place.startswith(os.sep) and place.strip(os.sep):
            yield place + os.sep


def _resolved_parent(path: str) -> str:
    try:
        return str(real_path(Path(path)).parent)
    except (OSError, ValueError, RuntimeError):
        return ""


def _shortened(value: Any, folders: re.Pattern[str]) -> Any:
    """All texts of a JSON value, keys included, without these folders."""
    if isinstance(value, str):
        return folders.sub("", value)
    if isinstance(value, list):
        return [_shortened(item, folders) for item in value]
    if isinstance(value, dict):
        return {_shortened(key, folders): _shortened(item, folders) for key, item in value.items()}
    return value


def _names(paths: list[str]) -> dict[str, str]:
    """Each path's name, with a number in front where several are of one name."""
    counts = Counter(Path(path).name for path in paths)
    return {
        path: Path(path).name if counts[Path(path).name] == 1 else f"{number}/{Path(path).name}"
        for number, path in enumerate(paths, start=1)
    }
