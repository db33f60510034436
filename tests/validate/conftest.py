"""What the tests of validate share."""

from tests.small_models import models
from tests.validate.engine_fixtures import (
    hermes_14b,
    hermes_llama,
    llama_gguf,
    llama_source,
    qwen_gguf,
    qwen_source,
)
from tests.validate.report_fixtures import four_variants, hostile, report

__all__ = [
    "four_variants",
    "hermes_14b",
    "hermes_llama",
    "hostile",
    "llama_gguf",
    "llama_source",
    "models",
    "qwen_gguf",
    "qwen_source",
    "report",
]
