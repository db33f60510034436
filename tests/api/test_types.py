"""What mypy knows of the API: this file is right at run time, and checked by mypy with the rest of the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import streamquant
import streamquant.convert.plan.planner
from streamquant import convert


def calls(model: Path) -> None:
    """Never called: mypy reads it."""
    plan = streamquant.plan(model, ["fp8-dynamic"], streamquant.ConversionOptions(name="x"))
    assert_type(plan, streamquant.Plan)
    assert_type(streamquant.convert(model, "fp8-dynamic", "out"), streamquant.Conversion)
    assert_type(convert(str(model), ["gguf:Q8_0"], Path("out")), streamquant.Conversion)
    options = streamquant.ValidationOptions(texts=(model,))
    assert_type(streamquant.validate(model, [model], options), streamquant.Report)
    assert_type(streamquant.verify("out"), list[streamquant.VerifiedVariant])
    streamquant.plan(model)  # type: ignore[call-arg]
    streamquant.convert(model, "fp8-dynamic", "out", "options")  # type: ignore[arg-type]


def test_they_are_functions() -> None:
    named: list[Callable[..., object]] = [streamquant.convert, streamquant.validate, calls]
    assert all(map(callable, named))
    assert streamquant.convert.plan.planner.make_plan  # type: ignore[attr-defined] # mypy sees the function
