"""All keys of a GGUF file, in the order in which llama.cpp's converter writes them.

general.* from the model card and the generation config, {arch}.* from config.json, tokenizer.* from the tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from streamquant.convert.architectures import ModelDescription
from streamquant.convert.metadata.embedding import embedding_keys
from streamquant.convert.metadata.guard_template import guard_gguf_keys
from streamquant.convert.metadata.model_metadata import ParameterCounts, read_model_metadata
from streamquant.convert.metadata.vocabulary import read_vocabulary
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.gguf_file import pack_key


@dataclass(frozen=True)
class GgufMetadata:
    """The keys that all GGUF variants of a model share, and what a user should know about them."""

    before_file_type: Mapping[str, GGUFValue]
    after_file_type: Mapping[str, GGUFValue]
    notes: tuple[str, ...]

    @cached_property
    def _packed(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        before, after = (
            {key: pack_key(key, value) for key, value in keys.items()}
            for keys in (self.before_file_type, self.after_file_type)
        )
        return before, after

    def for_file_type(self, file_type: int | None) -> dict[str, GGUFValue | bytes]:
        """All keys of a file of llama.cpp's file type `file_type` (LLAMA_FTYPE_*), packed once for all of them."""
        before, after = self._packed
        return {**before, Keys.General.FILE_TYPE: GGUFValue(file_type, GGUFValueType.UINT32), **after}

    @staticmethod
    def split_keys(number: int, count: int, tensors: int) -> dict[str, GGUFValue]:
        """The keys of file `number` (from 0) of `count`, which hold `tensors` tensors together."""
        return {
            Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(tensors, GGUFValueType.INT32),
        }


def gguf_metadata(
    checkpoint: Checkpoint,
    model: ModelDescription,
    *,
    counts: ParameterCounts,
    pre: str | None,
    overrides: Mapping[str, Any],
    guard_template: bool = False,
) -> GgufMetadata:
    """Collect the keys. `counts` are the weights of all GGUF tensors, for general.size_label;
    `guard_template` puts guards into chat templates (convert/metadata/guard_template.py).

    Raises StreamquantError for a tokenizer, card or config that cannot be expressed in GGUF.
    """
    vocabulary = read_vocabulary(
        checkpoint.folder, model.family.llama_cpp.vocabulary, vocab_size=model.vocab_size, pre=pre
    )
    general = read_model_metadata(checkpoint.folder, counts=counts, overrides=overrides, name=checkpoint.name)
    tokenizer: Mapping[str, Any] = vocabulary.metadata
    guards: tuple[str, ...] = ()
    if guard_template:
        tokenizer, guards = guard_gguf_keys(tokenizer)
    before = {
        Keys.General.ARCHITECTURE: GGUFValue(model.gguf_arch, GGUFValueType.STRING),
        **general,
        **model.metadata,
    }
    pooling, told = embedding_keys(checkpoint, model)
    after = {
        **model.added_metadata,
        **pooling,
        Keys.General.QUANTIZATION_VERSION: GGUFValue(GGML_QUANT_VERSION, GGUFValueType.UINT32),
        **tokenizer,
    }
    return GgufMetadata(before, after, (*vocabulary.notes, *guards, *told))
