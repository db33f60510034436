"""How chats are counted, with engines that say what a test wants: right, wrong, failing in the original too."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamquant.validate.engines.engine import Rendered
from streamquant.validate.text.chat import ChatReport, ExpectedChat, compare_chat
from streamquant.validate.text.chat_suite import chat_cases

FAILS = Rendered("", (), "roles must alternate")
PAIRS = {
    "the same": (Rendered("a b", (1, 2)), Rendered("a b", (1, 2))),
    "other text": (Rendered("a b", (1, 2)), Rendered("a c", (1, 3))),
    "other ids": (Rendered("a b", (1, 2)), Rendered("a b", (3,))),
    "both fail": (FAILS, Rendered("", (), "another message")),
    "only the original fails": (FAILS, Rendered("a", (1,))),
    "only the variant fails": (Rendered("a", (1,)), FAILS),
}


def compared(names: Sequence[str], tmp_path: Path, kind: str, controls: Sequence[Rendered] | None = None) -> ChatReport:
    """Cases of PAIRS; `controls` is what transformers makes of the variant's template, of those that differ."""
    cases = [*chat_cases()][: len(names)]
    (tmp_path / "chat_template.jinja").write_text("x")
    rendered = [PAIRS[name] for name in names]

    def facts(kind: str) -> SimpleNamespace:
        return SimpleNamespace(kind=kind, version="1", model=str(tmp_path), vocabulary=10)

    original: Any = SimpleNamespace(
        facts=facts("transformers"),
        path=tmp_path,
        detokenize=lambda runs: ["".join(map(str, run)) for run in runs],
        render=lambda *_, **__: controls,
    )
    variant: Any = SimpleNamespace(
        facts=facts(kind),
        apply_template=lambda _: [found for _, found in rendered],
        tokenize=lambda _, **__: [()],
    )
    chat = ExpectedChat(tuple(cases), tuple(expected for expected, _ in rendered))
    return compare_chat(original, variant, chat, template="x")


def counts(report: ChatReport) -> dict[str, int]:
    names = ("cases", "agreeing", "right", "wrong", "failing", "original_fails", "engine_differs")
    return {name: getattr(report, name) for name in names}


ONE_EACH = {
    "the same": {"agreeing": 1, "right": 1},
    "other text": {"wrong": 1},
    "other ids": {"wrong": 1},
    "both fail": {"failing": 1, "original_fails": 1},
    "only the original fails": {"original_fails": 1},
    "only the variant fails": {"wrong": 1},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_case_is_counted_once(name: str, tmp_path: Path) -> None:
    found = compared([name], tmp_path, "transformers")
    assert counts(found) == dict.fromkeys(counts(found), 0) | {"cases": 1} | ONE_EACH[name]
    assert found.agrees == (not found.wrong)


def test_all_together(tmp_path: Path) -> None:
    found = compared([*PAIRS, "both fail", "the same", "the same"], tmp_path, "transformers")
    assert counts(found) == {
        "cases": 9, "agreeing": 3, "right": 3, "wrong": 3, "failing": 2, "original_fails": 3, "engine_differs": 0,
    }  # fmt: skip
    assert found.right + found.wrong + found.original_fails == found.cases
    assert [problem.split(":")[1].split(" of ")[0] for problem in found.problems] == [" 1", " 1", " 1"]


def test_differences_of_the_engine_are_right(tmp_path: Path) -> None:
    """The variant's template gives the original's text in transformers: llama.cpp is what differs."""
    names = ["other text", "only the variant fails", "only the original fails", "both fail", "the same"]
    controls = [PAIRS[name][0] for name in names[:3]]
    found = compared(names, tmp_path, "llama.cpp", controls)
    assert counts(found) == {
        "cases": 5, "agreeing": 1, "right": 3, "wrong": 0, "failing": 1, "original_fails": 2, "engine_differs": 2,
    }  # fmt: skip
    assert found.agrees
    other = compared(names, tmp_path, "llama.cpp", [Rendered("z", (9,))] * 3)
    assert counts(other) == counts(found) | {"right": 1, "wrong": 2, "engine_differs": 0}
    assert not other.agrees
