"""Gates: what a variant must keep to be let through. Each is a limit on one measured number of one variant.

A gate whose number was not measured fails: what was not looked at is not let through.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from streamquant.quant.errors import UsageError

Measured = Mapping[str, float | None]
"""Numbers of a variant by their names in GATES; None where one was not measured."""


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits, None for none. Names are those of the command line, `max_mean_kld` for `--max-mean-kld`.

    max_mean_kld          mean KL divergence, nats per token
    max_kld_99_9          its 99.9th percentile over tokens, nats
    min_same_top          share of tokens with the same most likely token, 0 to 1
    max_ppl_ratio         PPL of the variant over that of the original
    max_errors            problems of severity error; by default none is let through
    max_token_mismatches  texts that are tokenized differently, known limits of an engine left aside
    max_chat_mismatches   conversations that are rendered differently, differences of the engines left aside
    """

    max_mean_kld: float | None = None
    max_kld_99_9: float | None = None
    min_same_top: float | None = None
    max_ppl_ratio: float | None = None
    max_errors: int | None = 0
    max_token_mismatches: int | None = None
    max_chat_mismatches: int | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not math.isfinite(limit) or limit < 0:
                raise UsageError("not a limit", where=option(name), found=limit, required="a number, not negative")
        if self.min_same_top is not None and self.min_same_top > 1:
            raise UsageError(
                "a share is at most 1", where=option("min_same_top"), found=self.min_same_top,
                required="0 to 1", hint="write 97% as 0.97",
            )  # fmt: skip

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: limit for name, limit in found.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate of one variant. `value` is None where the number was not measured; the gate failed then."""

    gate: str
    variant: str
    """Label."""
    limit: float
    value: float | None
    passed: bool

    @property
    def finding(self) -> str:
        """The limit and what was found, without the variant."""
        found = "not measured" if self.value is None else f"{self.value:.6g}"
        return f"{option(self.gate)} {self.limit:.6g}, found {found}"

    def __str__(self) -> str:
        return f"{self.variant}: {self.finding}"


@dataclass(frozen=True, slots=True)
class GateKind:
    """What a gate limits: the name of the measured number, and which side of the limit is let through."""

    number: str
    bound: Literal["at most", "at least"] = "at most"
    counts: bool = False
    """The number is a count: a limit is a whole number."""

    def passes(self, value: float, limit: float) -> bool:
        """Whether a value is let through; a NaN is not."""
        return value <= limit if self.bound == "at most" else value >= limit


GATES: Mapping[str, GateKind] = {
    "max_mean_kld": GateKind("mean KLD"),
    "max_kld_99_9": GateKind("99.9% KLD"),
    "min_same_top": GateKind("same top", "at least"),
    "max_ppl_ratio": GateKind("PPL ratio"),
    "max_errors": GateKind("errors", counts=True),
    "max_token_mismatches": GateKind("token mismatches", counts=True),
    "max_chat_mismatches": GateKind("chat mismatches", counts=True),
}
"""Every gate, by its name in Gates."""


def option(gate: str) -> str:
    """A gate as the command line spells it.

    >>> option("max_mean_kld")
    '--max-mean-kld'
    """
    return "--" + gate.replace("_", "-")


def judge(gates: Gates, variant: str, measured: Measured) -> tuple[GateResult, ...]:
    """The results of all gates that are set, for one variant; a NaN fails.

    >>> [str(found) for found in judge(Gates(min_same_top=0.9), "Q2_K", {"same top": 0.5, "errors": 0})]
    ['Q2_K: --min-same-top 0.9, found 0.5', 'Q2_K: --max-errors 0, found 0']
    """
    results = []
    for gate, limit in gates.limits().items():
        value = measured.get(GATES[gate].number)
        within = value is not None and GATES[gate].passes(value, limit)
        results.append(GateResult(gate, variant, limit, value, within))
    return tuple(results)


def failed(results: Sequence[GateResult]) -> list[GateResult]:
    """Those that failed."""
    return [result for result in results if not result.passed]


def parse_gates(record: object, where: str) -> Gates:
    """Gates of a recipe: a table with the names of the command line without dashes in front (`max-mean-kld: 0.05`).

    Raises UsageError, which names `where`, for an unknown name and for a value that is no limit.
    """
    known = {name.replace("_", "-"): name for name in GATES}
    if not isinstance(record, Mapping) or any(key not in known for key in record):
        raise UsageError("not gates", where=where, found=f"{record!r:.200}", required=f"a table of {', '.join(known)}")
    values: dict[str, Any] = {known[key]: value for key, value in record.items()}
    for name, value in values.items():
        counts = GATES[name].counts
        if value is not None and type(value) not in ((int,) if counts else (int, float)):
            required = "a whole number" if counts else "a number"
            raise UsageError("not a limit", where=f"{where}, {name}", found=f"{value!r:.80}", required=required)
    return Gates(**values)
