"""The sections of a validation, by name; imported by the command line, so without anything heavy."""

from collections.abc import Mapping
from typing import Literal

Section = Literal["comparison", "tensors", "noise", "tokens", "chat", "lints", "engines", "behaviour"]
SECTIONS: Mapping[Section, str] = {
    "comparison": "perplexity and divergence",
    "tensors": "error of every tensor",
    "noise": "noise floor of the original",
    "tokens": "tokens",
    "chat": "chat templates",
    "lints": "known faults of chat templates",
    "engines": "the engine that the file is made for",
    "behaviour": "greedy answers",
}
"""Sections of a report, in its order, and what they are about."""
SKIPPABLE = tuple(name for name in SECTIONS if name != "comparison")
FOLDER_ENGINES = ("vllm", "transformers")
"""What can run a checkpoint folder."""
ANSWER_TOKENS = 128
"""Tokens of a greedy answer, at most, unless the command says otherwise."""
