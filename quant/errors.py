"""The errors of streamquant: what, where, found, required, what to do.

StreamquantError   a foreseeable fault of the input or the machine; the command line prints it and exits with 1
└── UsageError     the command itself was wrong; exits with 2
"""


class StreamquantError(Exception):
    """A foreseeable fault, told in five parts.

    >>> print(StreamquantError("wrong dtype", where="model.safetensors, tensor 'a'", found="I64", required="BF16",
    ...                        hint="convert it first"))
    wrong dtype
      where:    model.safetensors, tensor 'a'
      found:    I64
      required: BF16
      to do:    convert it first
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: object = None,
        required: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        parts = [("where", where), ("found", found), ("required", required), ("to do", hint)]
        lines = [f"  {label + ':':<9} {value}" for label, value in parts if value is not None]
        super().__init__("\n".join([what, *lines]))


class UsageError(StreamquantError):
    """The command was given wrong: an unknown variant, a missing argument, options that contradict each other."""

    exit_code = 2
