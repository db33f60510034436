"""cls.output.weight of a reranker: the head's rows of "yes" and "no", which llama.cpp scores documents by.

Source: Qwen3Model.modify_tensors of llama.cpp's converter (conversion/qwen.py). The two rows are read and encoded when
the plan is made: they are a few kB.
"""

from dataclasses import dataclass

import numpy as np

from streamquant.convert.architectures import ModelDescription, TensorKind, TensorRule
from streamquant.convert.metadata.embedding import CLASSIFIER, answer_ids, is_reranker
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.tensor import SourceTensor
from streamquant.quant.errors import StreamquantError
from streamquant.quant.format import Importance, Rows
from streamquant.quant.formats import FORMATS


@dataclass(frozen=True, slots=True)
class Classifier:
    """Rows `ids` of the tensor `head` of a checkpoint; `replaces_head`: the GGUF does not hold `head` itself."""

    checkpoint: Checkpoint
    head: SourceTensor
    ids: tuple[int, ...]
    replaces_head: bool

    @property
    def tensor(self) -> SourceTensor:
        """As a tensor of the source, for the choice of its format."""
        shape = (len(self.ids), self.head.row_length)
        return SourceTensor(CLASSIFIER, self.head.dtype, shape, self.head.file, 0, 0)

    @property
    def rule(self) -> TensorRule:
        """Its rule."""
        return TensorRule(CLASSIFIER, CLASSIFIER, TensorKind.LINEAR, self.tensor.shape, None, required=False)

    def encode(self, format_name: str, importance: Importance | None) -> bytes:
        """Its bytes in a format. Raises StreamquantError if they cannot be read, are not finite, or do not fit."""
        rows = np.empty(self.tensor.shape, np.float32)
        is_finite = [self._widen(number, rows[at : at + 1]) for at, number in enumerate(self.ids)]
        if not all(is_finite):
            raise StreamquantError(
                "weight is not a number",
                where=f"{self.head.file}, tensor {self.head.name!r}, rows {self.ids}",
                required="finite weights",
            )
        return b"".join(part.tobytes() for part in FORMATS[format_name].encode(rows, importance))

    def _widen(self, number: int, row: Rows) -> bool:
        """Read a row of the head into float32[1, n]; whether it is finite."""
        spans = self.head.spans(number, number + 1, self.head.row_length)
        raw = (np.frombuffer(self.checkpoint.read_range(span.file, span.start, span.stop), np.uint8) for span in spans)
        return self.head.format.widen_into(tuple(raw), number, row)


def find_classifier(checkpoint: Checkpoint, model: ModelDescription) -> Classifier | None:
    """The classifier of a reranker; None for any other model. Raises StreamquantError if its answers are no tokens."""
    if not is_reranker(checkpoint.folder, checkpoint.name, checkpoint.config, model):
        return None
    own_head = not model.tied_embeddings and "lm_head.weight" in checkpoint.tensors
    head = checkpoint.tensors["lm_head.weight" if own_head else "model.embed_tokens.weight"]
    return Classifier(checkpoint, head, answer_ids(checkpoint.folder), own_head)
