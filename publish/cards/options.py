"""The options of `card`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What the command line adds to manifest and report.

    base_model    ORG/NAME of the original; by default that of the manifest, else that of the card before
    repo          ORG/NAME of the repository; of an --out folder the stem, as for push. Without it commands name files
    quantized_by  by default the ORG of `repo`, else that of the card before
    source        folder of the original, for its card, sampling defaults and chat template
    prompts       whether to render the chat template
    force         replace a README.md that is not ours
    """

    base_model: str | None = None
    repo: str | None = None
    quantized_by: str | None = None
    source: Path | None = None
    prompts: bool = True
    force: bool = False
