"""What a user of a variant should know of it."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a variant that its user should know.

    check is a short stable name ("file-type", "rope"); an error means that the variant does not compute what the
    original does, a warning that a runtime may not, a note that a number has a condition.
    """

    check: str
    severity: Severity
    what: str
    where: str | None = None
    found: str | None = None
    required: str | None = None

    def __str__(self) -> str:
        parts = [f"{label} {value}" for label, value in (("found", self.found), ("required", self.required)) if value]
        where = f" ({self.where})" if self.where else ""
        return f"{self.what}{where}{': ' if parts else ''}{', '.join(parts)}"
