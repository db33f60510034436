"""What the tests of importance matrices share."""

from tests.small_models import models

__all__ = ["models"]
