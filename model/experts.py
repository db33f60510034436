"""The experts of a layer as linear layers of their own.

transformers keeps the experts of a layer as fused three-dimensional parameters. Here each is a module with the names
that checkpoints have, so that what watches and quantizes the inputs of linear layers sees those of every expert.
"""

from typing import TYPE_CHECKING, Any

from streamquant.convert.architectures.family import Experts
from streamquant.model.expert_streaming import ExpertCall

if TYPE_CHECKING:
    import torch


def separate_experts(skeleton: Any, experts: Experts) -> None:
    """Put `make_experts` in the place of the fused experts of the layers of a model on the meta device."""
    for layer in skeleton.model.layers:
        block = layer.get_submodule(experts.path)
        if hasattr(block, "experts"):
            block.experts = make_experts(block.experts, experts)


def module_name(stored: str, experts: Experts | None) -> str:
    """The name that transformers has for a parameter of a layer that checkpoints store under another.

    >>> experts = Experts(("num_experts",), "top_k", "intermediate_size", stored_path="block_sparse_moe")
    >>> module_name("block_sparse_moe.experts.3.w1.weight", experts)
    'mlp.experts.3.w1.weight'
    """
    if experts is None or not stored.startswith(f"{experts.stored_path}."):
        return stored
    local = stored.removeprefix(f"{experts.stored_path}.")
    module, _, last = local.rpartition(".")
    parts = experts.path, experts.renamed.get(module, module), last
    return ".".join(part for part in parts if part)


def make_experts(fused: Any, experts: Experts) -> "torch.nn.Module":
    """A module that computes what transformers' experts compute: act(gate(x)) * up(x), through down, weighted.

    `fused` has the parameters gate_up_proj [experts, 2 * intermediate, hidden] and down_proj [experts, hidden,
    intermediate], and act_fn; GPT-OSS' are transposed, gate and up by turns, with biases, and it has _apply_gate.
    (the class of experts in transformers/models/*/modeling_*.py)
    """
    import torch

    count, hidden, intermediate = fused.down_proj.shape
    if experts.by_turns:
        hidden, intermediate = intermediate, hidden

    def activate(gate: "torch.Tensor", up: "torch.Tensor") -> "torch.Tensor":
        if not experts.by_turns:
            return fused.act_fn(gate) * up
        return fused._apply_gate(torch.stack((gate, up), -1).flatten(-2))

    class Separate(torch.nn.ModuleList):  # type: ignore[misc] # torch is imported lazily
        def forward(
            self, hidden_states: "torch.Tensor", top_k_index: "torch.Tensor", top_k_weights: "torch.Tensor"
        ) -> "torch.Tensor":
            """[tokens, hidden], int64[tokens, k], [tokens, k] -> [tokens, hidden]."""
            call = ExpertCall(hidden_states, top_k_index, top_k_weights, torch.zeros_like(hidden_states))
            for number in torch.unique(top_k_index).tolist():
                self.answer(call, number)
            return call.out

        def answer(self, call: ExpertCall, number: int) -> None:
            """Add what one expert has to say."""
            # The tokens in transformers' order: a product rounds its last rows otherwise than the others.
            place, token = torch.where((call.top_k_index == number).T)
            if not token.numel():
                return  # who is not asked is not watched either
            expert, x = self[number], call.hidden_states[token]
            y = activate(expert[experts.gate](x), expert[experts.up](x))
            y = expert[experts.down](y) * call.top_k_weights[token, place, None]
            call.out.index_add_(0, token, y.to(call.out.dtype))

    def expert() -> torch.nn.ModuleDict:
        with torch.device("meta"):
            return torch.nn.ModuleDict(
                {
                    experts.gate: torch.nn.Linear(hidden, intermediate, bias=experts.by_turns),
                    experts.up: torch.nn.Linear(hidden, intermediate, bias=experts.by_turns),
                    experts.down: torch.nn.Linear(intermediate, hidden, bias=experts.by_turns),
                }
            )

    return Separate(expert() for _ in range(count)).eval()
