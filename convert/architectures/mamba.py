"""Mamba-2 layers: the rows of a layer table, their sizes and the keys of a GGUF, shared by families that have them.

The state of a token is a matrix for each head; B, C and the convolution's channels are shared by the heads of a group.
The converter writes -exp(A_log), makes columns of A and D, cuts the norm by groups and leaves out the convolution's
middle dimension (Mamba2Model in conversion/mamba.py of llama.cpp).
"""

from dataclasses import dataclass, replace

import gguf

from streamquant.convert.architectures.family import LayerTensor, Size, TensorKind, Terms, ViewRow, linear, norm
from streamquant.convert.architectures.gguf_keys import Field, GgufKey, Product, u32
from streamquant.convert.architectures.layers import LINEAR
from streamquant.convert.architectures.tensor_view import MINUS_EXP

INNER, HEADS, GROUPS, CHANNELS = "mamba inner", "mamba heads", "mamba groups", "mamba channels"
_PROJECTED, _KERNEL = "mamba projected", "mamba convolution"
_COLUMN = (("one", 1),)


@dataclass(frozen=True, slots=True)
class MambaKeys:
    """What a family's config.json calls the sizes of its Mamba-2 layers; `inner` are the channels of all heads."""

    inner: Terms
    heads: str
    groups: str
    state: str
    kernel: str
    conv_bias: str
    proj_bias: str

    @property
    def sizes(self) -> dict[Size, Terms]:
        """For Family.sizes."""
        of_groups = (2, self.groups, self.state)
        return {
            INNER: self.inner,
            HEADS: ((self.heads,),),
            GROUPS: ((self.groups,),),
            CHANNELS: (*self.inner, of_groups),
            _PROJECTED: (*((2, *factors) for factors in self.inner), of_groups, (self.heads,)),
            _KERNEL: ((self.kernel,),),
        }

    def rows(self, path: str) -> tuple[LayerTensor, ...]:
        """The rows of a layer table, for the layers that are tagged as linear attention."""
        rows = (
            *linear(f"{path}.in_proj", (_PROJECTED, "hidden"), bias=self.proj_bias),
            LayerTensor(
                f"{path}.conv1d.weight",
                TensorKind.CONVOLUTION,
                (CHANNELS, "one", _KERNEL),
                view=ViewRow("c one k -> c k"),
            ),
            LayerTensor(f"{path}.conv1d.bias", TensorKind.BIAS, (CHANNELS,), when=self.conv_bias),
            LayerTensor(f"{path}.dt_bias", TensorKind.STATE, (HEADS,)),
            LayerTensor(
                f"{path}.A_log", TensorKind.STATE, (HEADS,), view=ViewRow("(h one) -> h one", _COLUMN, MINUS_EXP)
            ),
            LayerTensor(f"{path}.D", TensorKind.STATE, (HEADS,), view=ViewRow("(h one) -> h one", _COLUMN)),
            replace(norm(f"{path}.norm", INNER), view=ViewRow("(g d) -> g d", (("g", GROUPS),))),
            *linear(f"{path}.out_proj", ("hidden", INNER), bias=self.proj_bias),
        )
        return tuple(replace(row, on=LINEAR) for row in rows)

    def gguf(self, inner: Product | str) -> tuple[GgufKey, ...]:
        """The keys in the converter's order (set_gguf_parameters of the hybrid classes)."""
        return (
            u32(gguf.Keys.SSM.CONV_KERNEL, Field(self.kernel)),
            u32(gguf.Keys.SSM.STATE_SIZE, Field(self.state)),
            u32(gguf.Keys.SSM.GROUP_COUNT, Field(self.groups)),
            u32(gguf.Keys.SSM.INNER_SIZE, inner),
            u32(gguf.Keys.SSM.TIME_STEP_RANK, Field(self.heads)),
        )
