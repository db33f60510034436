import math

import pytest

from streamquant.quant.errors import UsageError
from streamquant.validate.gates import GATES, Gates, failed, judge, option, parse_gates

GOOD = {
    "mean KLD": 0.01, "99.9% KLD": 0.5, "same top": 0.95, "PPL ratio": 1.01, "errors": 0, "token mismatches": 0,
    "chat mismatches": 0,
}  # fmt: skip
ALL = Gates(0.01, 0.5, 0.95, 1.01, 0, 0, 0)


def test_a_number_at_its_limit_passes_and_one_beyond_fails() -> None:
    assert failed(judge(ALL, "a", GOOD)) == []
    for gate, kind in GATES.items():
        name = kind.number
        worse = 0.94999 if kind.bound == "at least" else GOOD[name] + 1e-9
        wrong = failed(judge(ALL, "a", {**GOOD, name: worse}))
        assert [result.gate for result in wrong] == [gate]
        assert str(wrong[0]).startswith(f"a: {option(gate)} ")


@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_fails(value: float | None) -> None:
    for gate, kind in GATES.items():
        name = kind.number
        assert [result.gate for result in failed(judge(ALL, "a", {**GOOD, name: value}))] == [gate]
        missing = {key: number for key, number in GOOD.items() if key != name}
        assert [result.gate for result in failed(judge(ALL, "a", missing))] == [gate]
    assert "not measured" in str(failed(judge(ALL, "a", {}))[0])


def test_by_default_errors_alone_fail() -> None:
    assert failed(judge(Gates(), "a", {"errors": 0})) == []
    assert [result.gate for result in failed(judge(Gates(), "a", {"errors": 1}))] == ["max_errors"]


@pytest.mark.parametrize("limits", [{"min_same_top": 97.0}, {"max_mean_kld": -1.0}, {"max_ppl_ratio": math.nan}])
def test_impossible_limits(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Gates(**limits)  # type: ignore[arg-type] # the fields of these are floats


def test_gates_of_a_recipe() -> None:
    found = parse_gates({"max-mean-kld": 0.05, "min-same-top": 1, "max-errors": 3}, "recipe.yaml, gates")
    assert found == Gates(max_mean_kld=0.05, min_same_top=1, max_errors=3)
    for record in (
        {"max-kld": 1},
        ["max-mean-kld"],
        {"max-mean-kld": "0.1"},
        {"max-errors": 1.5},
        {"max-errors": True},
    ):
        with pytest.raises(UsageError, match="recipe"):
            parse_gates(record, "recipe.yaml, gates")
