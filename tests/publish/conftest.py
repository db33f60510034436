"""What the tests of publish share."""

from tests.publish.hub_client import hub, out, small_variants
from tests.validate.engine_fixtures import hermes_14b
from tests.validate.report_fixtures import four_variants, report

__all__ = ["four_variants", "hermes_14b", "hub", "out", "report", "small_variants"]
