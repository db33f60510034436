"""Which of several models an error is about."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from streamquant.model.variants.variant import Variant
from streamquant.quant.errors import StreamquantError, UsageError


class VariantError(StreamquantError):
    """A fault of one of several models that are computed together: `variant` is the one, the parts are the fault's."""

    variant: Variant

    @classmethod
    def of(cls, fault: StreamquantError, variant: Variant) -> Self:
        """A fault as the variant's."""
        error = cls(fault.what, where=fault.where, found=fault.found, required=fault.required, hint=fault.hint)
        error.variant = variant
        return error


@contextmanager
def errors_of(variant: Variant) -> Iterator[None]:
    """Raise a StreamquantError of the block as the variant's VariantError, unless it is one already.

    A UsageError stays what it is: the command was wrong, not the variant.
    """
    try:
        yield
    except (UsageError, VariantError):
        raise
    except StreamquantError as fault:
        raise VariantError.of(fault, variant) from fault
