"""What the tests of the forward pass and variants share."""

from tests.small_models import models

__all__ = ["models"]
