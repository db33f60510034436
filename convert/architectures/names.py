"""The names under which checkpoints store the tensors of a decoder, and the one under which everything here knows them.

Tools leave their wrappers in the names: torch.compile `_orig_mod.`, FSDP and activation checkpointing theirs, DDP
`module.`, peft `base_model.model.`, a multimodal parent `language_model.`; a model that was saved without its head
(AutoModel) has no `model.`. What is left after them is the name in XForCausalLM's state dict. transformers adds and
removes `model.` when it loads (rename_source_key of core_model_loading.py), llama.cpp's converter `language_model.`
(filter_tensors of conversion/base.py) and, for classes without a head, `model.`; neither knows the wrappers of
training tools.
"""

import re
from collections.abc import Iterable

_TOOLS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PARENT = "language_model."
_IN_FRONT = re.compile(r"(?:module\.|base_model\.model\.)+")
_BODY = re.compile(r"(?:embed_tokens|layers|norm|embedding_norm)\.")
_WRAPPERS = {wrapper: re.compile(rf"(?<![^.]){re.escape(wrapper)}") for wrapper in (*_TOOLS, _PARENT)}
_TWICE = re.compile(r"model\.(?=(?:model|lm_head)\.)")


def model_name(stored: str) -> str:
    """The name of a tensor in the state dict of XForCausalLM, by the name that a checkpoint stores it under.

    A name of something else comes back as it is, but for the wrappers.

    >>> model_name("_orig_mod.model.layers.0.self_attn._orig_mod.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    >>> model_name("language_model.model.norm.weight"), model_name("model.language_model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    >>> model_name("embed_tokens.weight"), model_name("base_model.model.lm_head.weight")
    ('model.embed_tokens.weight', 'lm_head.weight')
    """
    return of_published(published_name(stored))


def of_published(published: str) -> str:
    """The same by the name that a published checkpoint has."""
    name = _without(published, _PARENT)
    name = _TWICE.sub("", name) if _TWICE.match(name) else name
    return f"model.{name}" if _BODY.match(name) else name


def published_name(stored: str) -> str:
    """The name without what training tools leave in it: that of a published checkpoint, a multimodal one too.

    >>> published_name("module.model.language_model.norm._orig_mod.weight")
    'model.language_model.norm.weight'
    """
    name = stored
    for tool in _TOOLS:
        name = _without(name, tool)
    return _IN_FRONT.sub("", name) if _IN_FRONT.match(name) else name


def _without(name: str, wrapper: str) -> str:
    if wrapper not in name:
        return name  # as nearly always: a mixture of experts has a hundred thousand names
    return _WRAPPERS[wrapper].sub("", name)


def renaming_note(stored: Iterable[str], *, is_multimodal: bool = False) -> str | None:
    """What a user should know where a checkpoint's names are not those of its class; None where they are."""
    wanted = published_name if is_multimodal else model_name
    for name in stored:
        if (known := wanted(name)) != name:
            return f"the checkpoint calls its tensors otherwise: {name!r} is {known!r} here and in every variant"
    return None
