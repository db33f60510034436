"""A layer whose experts are read one at a time, because all of them together do not fit into memory.

Three passes over a share of the tokens give the same bits as one with the whole layer: the first runs the layer up to
its experts and notes what they are asked, the second answers expert by expert, in their order, and the third runs the
layer again with these answers. Attention is computed twice, which costs little beside the experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class ExpertCall:
    """What the experts of a layer were asked for one batch of tokens, and their answer so far."""

    hidden_states: "torch.Tensor"
    """[tokens, hidden]"""
    top_k_index: "torch.Tensor"
    """int64[tokens, k]: the experts of each token."""
    top_k_weights: "torch.Tensor"
    """[tokens, k]"""
    out: "torch.Tensor"
    """[tokens, hidden]: the weighted sum of their outputs."""


@dataclass(slots=True, eq=False)
class ExpertCalls:
    """The calls of a share of the tokens, in the order of their batches."""

    calls: list[ExpertCall] = field(default_factory=list)

    @contextmanager
    def noted(self, block: Any) -> Iterator[None]:
        """While it is open, the experts of a block note what they are asked, and answer zeros."""
        import torch

        def note(
            hidden_states: "torch.Tensor", top_k_index: "torch.Tensor", top_k_weights: "torch.Tensor"
        ) -> "torch.Tensor":
            out = torch.zeros_like(hidden_states)
            self.calls.append(ExpertCall(hidden_states, top_k_index, top_k_weights, out))
            return torch.zeros_like(hidden_states)

        with _in_place_of_experts(block, note):
            yield

    @contextmanager
    def answered(self, block: Any) -> Iterator[None]:
        """While it is open, the experts of a block give the answers, one batch after another."""
        outputs = iter(self.calls)

        def answer(*_asked: "torch.Tensor") -> "torch.Tensor":
            return next(outputs).out

        with _in_place_of_experts(block, answer):
            yield

    def reached(self) -> list[int]:
        """The experts that a token was sent to, in their order."""
        import torch

        if not self.calls:
            return []
        return [int(n) for n in torch.unique(torch.cat([call.top_k_index.reshape(-1) for call in self.calls]))]


@contextmanager
def _in_place_of_experts(block: Any, function: Any) -> Iterator[None]:
    import torch

    class Stand(torch.nn.Module):  # type: ignore[misc] # torch is imported lazily
        def forward(self, *arguments: "torch.Tensor") -> "torch.Tensor":
            return function(*arguments)

    whole = block.experts
    block.experts = Stand()
    try:
        yield
    finally:
        block.experts = whole
