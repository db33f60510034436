"""The errors of streamquant: one tree, and the exit code of the command line for each.

| error                  | exit code | what it is                                                             |
|------------------------|-----------|------------------------------------------------------------------------|
| StreamquantError       | 1         | a foreseeable fault of the input or the machine                        |
| └── UsageError         | 2         | the command itself was wrong                                           |
| └── GateFailedError    | 3         | a variant failed a gate, or was not measured at all                    |
| KeyboardInterrupt      | 130       | Ctrl-C or SIGTERM: an interruption is no fault, so Python's own error  |

The library raises them; only the command line turns them into exit codes.
"""

from typing import ClassVar

from streamquant.quant.printable import visible_lines

LONGEST = 2000
"""Characters of one part of a message: a stranger's file can fill it with megabytes."""


class StreamquantError(Exception):
    """A foreseeable fault, told in five parts, which are attributes of the same names.

    The message is safe to print: what would not be seen is escaped, lines of a part are indented, long parts are cut.

    >>> print(StreamquantError("wrong dtype", where="model.safetensors, tensor 'a'", found="I64", required="BF16",
    ...                        hint="convert it first"))
    wrong dtype
      where:    model.safetensors, tensor 'a'
      found:    I64
      required: BF16
      to do:    convert it first
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        required: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.required, self.hint = what, where, found, required, hint
        parts = [("where", where), ("found", found), ("required", required), ("to do", hint)]
        lines = [f"  {label + ':':<9} {_shown(value)}" for label, value in parts if value is not None]
        super().__init__("\n".join([_shown(what), *lines]))

    def at(self, where: str) -> "StreamquantError":
        """The same fault, told with a place that the caller knows better."""
        return type(self)(self.what, where=where, found=self.found, required=self.required, hint=self.hint)


def _shown(part: object) -> str:
    """A part as the message has it. Its further lines stand below its first, so that none passes for another part."""
    text = str(part)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text) - LONGEST:,} more characters)"
    return visible_lines(text).replace("\n", "\n" + " " * 12)


class UsageError(StreamquantError):
    """The command was given wrong: an unknown variant, a missing argument, options that contradict each other."""

    exit_code = 2


class GateFailedError(StreamquantError):
    """A variant failed a gate, or was not measured and so passed none; nothing was published."""

    exit_code = 3
