"""docs/adding-a-format.md is a promise: a type needs what the page names, and no other source file knows its name.

The type that is added here is NVFP4, which ggml has and streamquant does not make yet; its encoder is plain numpy.
"""

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes import recipe as recipes
from streamquant.convert.recipes.mix import DEFAULTS
from streamquant.convert.recipes.overrides import Overrides, parse_rule
from streamquant.convert.recipes.recipe import RECIPES, parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.activations import through_q8_0
from streamquant.model.variants.open import open_variant
from streamquant.quant.format import Format, Rows, StoredType
from streamquant.quant.formats import FORMATS, STORED_TYPES, stored_type
from streamquant.quant.ggml.blocks import block_format
from streamquant.validate.readback.verify import verify
from tests import checks
from tests.attacks.harness import write_model
from tests.docs.pages import ROOT

NAME = "NVFP4"
ROOMS = ("quant", "files", "hub", "convert", "model", "calibrate", "validate", "publish", "streamquant/cli")
PAGE = ROOT / "docs" / "adding-a-format.md"


def scales(rows: Rows) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The codes of the scales uint8[r, n / 16], and half of the scales float32[r, n / 16, 1]."""
    largest = abs(rows.reshape(rows.shape[0], rows.shape[1] // 16, 16)).max(axis=-1) / np.float32(6)
    with np.errstate(all="ignore"):
        codes = gguf.quants.NVFP4.fp32_to_ue4m3(largest).astype(np.uint8)
    return codes, gguf.quants.NVFP4.ue4m3_to_fp32(codes).astype(np.float32)[..., None]


def encode(rows: Rows, out: NDArray[np.uint8]) -> int:
    """Super-blocks of 64: 4 scales in UE4M3, then for each the 16 codes in E2M1, two in a byte."""
    codes, half = scales(rows)
    levels = np.array(gguf.quants.NVFP4.kvalues, np.float32)
    weights = rows.reshape(rows.shape[0], rows.shape[1] // 16, 16)
    q = np.zeros(weights.shape, np.uint8)
    best = np.full(weights.shape, np.inf, np.float32)
    for code, level in enumerate(levels):
        error = abs(weights - half * level)
        q[error < best], best = code, np.minimum(error, best)
    packed = q[..., :8] | q[..., 8:] << 4
    blocks = rows.shape[0], rows.shape[1] // 64
    out.reshape(*blocks, 36)[:, :, :4] = codes.reshape(*blocks, 4)
    out.reshape(*blocks, 36)[:, :, 4:] = packed.reshape(*blocks, 32)
    return -1


def bound(rows: Rows) -> NDArray[np.float64]:
    """Half of the widest step, between 4 and 6; a scale that was rounded down or is the largest cuts off at 6."""
    half = scales(rows)[1].astype(np.float64)
    weights = abs(rows.reshape(rows.shape[0], rows.shape[1] // 16, 16).astype(np.float64))
    return (np.maximum(2 * half, weights - 12 * half) * (1 + 1e-6)).reshape(rows.shape)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Format:
    """What the page tells to do: the line, the bound, the mix and the variant."""
    format_ = block_format(StoredType(NAME, "Q8_0", 11, 1.0), encode)
    monkeypatch.setitem(FORMATS, NAME, format_)
    monkeypatch.setitem(STORED_TYPES, NAME, format_.stored)
    monkeypatch.setitem(checks.BOUNDS, NAME, bound)
    monkeypatch.setitem(checks.SEARCHED, NAME, 1.0)
    monkeypatch.setitem(DEFAULTS, NAME, NAME)
    variant = recipes._gguf(NAME, "for the test")
    monkeypatch.setitem(RECIPES, variant.spec, variant)
    return format_


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(added: Format, check: Callable[[Format], None]) -> None:
    check(added)


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [(f"gguf:{NAME}", Overrides()), ("gguf:Q8_0", Overrides((parse_rule("ffn=F16"), ("attn_q", NAME))))],
    ids=["file type", "override"],
)
def test_plans_converts_and_reads_back(added: Format, tmp_path: Path, spec: str, overrides: Overrides) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "Model"))
    chosen, options = parse_variants([spec]), ConversionOptions(overrides=overrides)
    plan = make_plan(checkpoint, chosen, options)
    formats = {tensor.sources[0]: tensor.format for tensor in plan.variants[0].tensors}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert formats[name] == NAME
    convert(make_plan(checkpoint, chosen, options), tmp_path / "out", RunOptions(jobs=1))
    assert not [problem for result in verify(tmp_path / "out", checkpoint) for problem in result.problems]
    original, made = open_variant(checkpoint.folder), open_variant(tmp_path / "out" / plan.files[0].path)
    source, decoded = (np.concatenate([block.numpy() for _, block in v.blocks(name)]) for v in (original, made))
    assert np.array_equal(decoded, added.decode(added.encode(source), source.shape[1]))
    assert made.input_quantizer(name.removesuffix(".weight")) is through_q8_0


def test_what_is_not_added_is_not_known() -> None:
    """So that the test above tests the fixture."""
    assert NAME not in FORMATS
    assert stored_type(NAME) == StoredType(NAME)


def named() -> set[str]:
    """The paths of source files in the page, as patterns: NAME stands for any."""
    found = re.findall(r"`((?:quant|convert|files|model|validate|publish)/[\w/*]+\.py)`", PAGE.read_text())
    return {path.replace("NAME", "*") for path in found}


@pytest.mark.parametrize("name", ["IQ4_XS", "Q5_1", "TQ2_0", "Q3_K"])
def test_only_the_files_of_the_page_know_a_type(name: str) -> None:
    paths = [path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    knowing = {path for path in paths if re.search(rf"\b{name}\b", (ROOT / path).read_text())}
    assert any(path.startswith("quant/ggml/") for path in knowing)
    assert not {path for path in knowing if not any(fnmatch.fnmatch(path, pattern) for pattern in named())}
