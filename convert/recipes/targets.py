"""Which modules the targets and the ignore list of a quantization_config mean; --ignore is written like these."""

import re
from collections.abc import Iterable, Sequence

from streamquant.convert.architectures import TensorKind
from streamquant.convert.recipes.patterns import Pattern, compile_pattern
from streamquant.quant.errors import UsageError

CLASSES = ("Linear", "Embedding", "Module")
"""Names of classes that mean modules of every name."""


class Targets:
    """Names of modules, "re:" and a pattern, names of classes, in the order in which compressed-tensors takes them.

    As match_targets (compressed_tensors/utils/match.py) finds them, but a pattern that backtracks without end is an
    error instead of a process that hangs.
    """

    def __init__(self, targets: Iterable[str], where: str) -> None:
        """`where`: for messages. Raises re.error for a pattern that does not compile."""
        self._names = set(targets)
        expressions = sorted(target for target in self._names if target.startswith("re:"))
        self._patterns: Sequence[tuple[str, Pattern]] = [
            (target, compile_pattern(target.removeprefix("re:"), where)) for target in expressions
        ]

    def first(self, module: str, kind: TensorKind) -> str | None:
        """The target that means a module and counts before others; None: no target does.

        Raises UsageError for a pattern that takes too long.

        >>> targets = Targets(["Linear", "re:.*q_proj", "lm_head"], "config.json")
        >>> targets.first("model.layers.0.self_attn.q_proj", TensorKind.LINEAR)
        're:.*q_proj'
        >>> targets.first("lm_head", TensorKind.HEAD)
        'lm_head'
        >>> targets.first("model.embed_tokens", TensorKind.EMBEDDING)
        """
        if module in self._names:
            return module
        found = next((target for target, pattern in self._patterns if pattern.match(module)), None)
        if found is not None:
            return found
        of_module = ("Embedding" if kind is TensorKind.EMBEDDING else "Linear", "Module")
        return next((name for name in of_module if name in self._names), None)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Those that mean none of some modules, their order aside."""
        left = set(self._names)
        for module in modules:
            found = (target for target, pattern in self._patterns if target in left and pattern.match(module))
            left -= {module, *found}
        return sorted(left)


def parse_ignore(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """What --ignore was given, each checked. Raises UsageError for a pattern that does not compile and for a class.

    >>> parse_ignore(["re:.*down_proj$", "lm_head"], "--ignore")
    ('re:.*down_proj$', 'lm_head')
    """
    for text in texts:
        if text in ("", *CLASSES):
            raise UsageError(
                "not a module to leave alone",
                where=where,
                found=repr(text),
                required="the name of a module, or re: and a pattern: a class means every linear layer",
            )
        try:
            Targets([text], where)
        except re.error as error:
            raise UsageError(
                "pattern does not compile",
                where=where,
                found=f"{text!r:.200}: {error}",
                required="re: and a Python regex",
            ) from error
    return tuple(dict.fromkeys(texts))
