"""report.json, wrong at any place: one error that names it, or a report that can be shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from streamquant.files.records import to_json
from streamquant.publish.cards.public_report import public_report
from streamquant.quant.errors import StreamquantError
from streamquant.validate.report.console import report_view
from streamquant.validate.report.data import REPORT, Report, read_report
from streamquant.validate.report.render import render_markdown
from tests.attacks.wrong_json import wrong_records, wrong_texts


def short(value: Any) -> Any:
    """Every list with at most two items, so that a record is small."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value[:2]] if isinstance(value, list) else value


@pytest.mark.parametrize("part", [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)])
def test_wrong_reports(part: int, hostile: Report, tmp_path: Path) -> None:
    path = tmp_path / REPORT
    record = short(to_json(hostile, "report"))
    cases = [*((what, json.dumps(wrong).encode()) for what, wrong in wrong_records(record)), *wrong_texts(record)]
    taken: list[tuple[str, Report]] = []
    refused = 0
    for what, data in cases[::part]:
        path.write_bytes(data)
        try:
            taken.append((what, read_report(path)))
        except StreamquantError as error:
            refused += 1
            if str(path) not in str(error.where) or not error.hint:
                pytest.fail(f"{what}: {error}")
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
    assert refused > 2 * len(taken) > 0
    for what, found in taken[:: max(1, 17 // part)]:
        try:
            render_markdown(found, [])
            public_report(found)
            report_view(found)
        except StreamquantError:
            pass
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
