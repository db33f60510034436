"""Faults planted in real files, one at a time: the report must find each, and name it.

FAULTS is the table: fault -> the check of the report that catches it. Faults of weights are planted in conversions of
`tiny`, those of tokens and chat in a synthetic model with the tokenizer of Hermes 4.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from gguf.constants import GGUFValueType, LlamaFileType, TokenType
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from streamquant.convert.architectures.tensor_view import resolve, rope_view
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.variants.open import open_variant
from streamquant.validate.report.console import report_view
from streamquant.validate.report.data import Report, VariantReport
from streamquant.validate.report.render import render_html, render_markdown
from streamquant.validate.validation import chat_check, validate
from tests.conftest import TINY_PRE, Shelf
from tests.peers import requires_llama_cpp
from tests.small_models import edit_gguf
from tests.validate.engine_fixtures import Model, with_keys
from tests.validate.report_fixtures import small_options, write_text

Rows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, the check that catches it, and a word that the problem says."""

    check: str
    says: str
    severity: Literal["error", "warning"] = "error"


FAULTS: Mapping[str, Fault] = {
    "rows of q and k not permuted": Fault("tensor", "model.layers.1.self_attn.q_proj.weight"),
    "one wrong scale": Fault("block", "model.layers.1.mlp.up_proj.weight"),
    "one tensor swapped": Fault("tensor", "model.layers.0.mlp.gate_proj.weight"),
    "rope_freqs left out": Fault("rope", "rope_freqs.weight left out"),
    "template replaced": Fault("chat", "cases differ"),
    "BOS flag flipped": Fault("tokens", "BOS and EOS added"),
    "a special token's type changed": Fault("token-types", "CONTROL expected"),
    "a truncated split": Fault("unreadable", "00002-of-0000"),
    "an F16 file named Q4_K_M": Fault("file-type", "general.file_type", "warning"),
    "embeddings quantized to FP8": Fault("quantized-tensor", "model.embed_tokens.weight"),
}
TOKENS_AND_CHAT = ("template replaced", "BOS flag flipped", "a special token's type changed")
HEADS = {"q": 8, "k": 2}


# --- planting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(shelf: Shelf, tiny: Path) -> Path:
    """`tiny` as FP8-dynamic and GGUF."""

    def make(folder: Path) -> None:
        options, split = ConversionOptions(pre=TINY_PRE), ConversionOptions(pre=TINY_PRE, split_max_size=1_000_000)
        specs = parse_variants(["fp8-dynamic", "gguf:F16,Q8_0,Q4_K_M"])
        convert(make_plan(open_checkpoint(tiny), specs, options), folder / "whole", RunOptions(jobs=2))
        convert(
            make_plan(open_checkpoint(tiny), parse_variants(["gguf:Q8_0"]), split), folder / "split", RunOptions(jobs=2)
        )

    return shelf.get("faults-good", make)


def gguf_of(good: Path, kind: str) -> Path:
    return good / "whole" / "Tiny-GGUF" / f"Tiny-{kind}.gguf"


def split_of(good: Path) -> list[Path]:
    return sorted((good / "split").rglob("*.gguf"))


def not_permuted(good: Path, out: Path) -> Path:
    """Rows as Hugging Face has them: what a converter writes that forgets the permutation."""

    def undo(heads: int) -> Callable[[Rows], Rows]:
        return lambda rows: rows[resolve(rope_view(heads, 1), (len(rows),)).to]

    edits = {f"blk.1.attn_{part}.weight": undo(heads) for part, heads in HEADS.items()}
    return edit_gguf(gguf_of(good, "Q8_0"), out / "Tiny-Q8_0.gguf", tensors=edits)


def wrong_scale(good: Path, out: Path) -> Path:
    """The scale of one block of 32 weights, a quarter too large: nothing that a tensor's SQNR would show."""

    def enlarge(rows: Rows) -> Rows:
        rows = rows.copy()
        scale = rows[7, 34:36].view(np.float16)
        scale *= np.float16(1.25)
        return rows

    return edit_gguf(gguf_of(good, "Q8_0"), out / "Tiny-Q8_0.gguf", tensors={"blk.1.ffn_up.weight": enlarge})


def swapped(good: Path, out: Path) -> Path:
    """gate and up of one layer in each other's place: of one shape and type."""
    found: dict[str, Rows] = {}

    def keep(name: str) -> Callable[[Rows], Rows]:
        def edit(rows: Rows) -> Rows:
            found[name] = rows.copy()
            return rows

        return edit

    names = ("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")
    path = out / "Tiny-Q8_0.gguf"
    edit_gguf(gguf_of(good, "Q8_0"), path, tensors={name: keep(name) for name in names})
    exchange = {names[0]: lambda _rows: found[names[1]], names[1]: lambda _rows: found[names[0]]}
    return edit_gguf(gguf_of(good, "Q8_0"), path, tensors=exchange)


def no_rope_freqs(good: Path, out: Path) -> Path:
    return edit_gguf(gguf_of(good, "Q8_0"), out / "Tiny-Q8_0.gguf", tensors={"rope_freqs.weight": None})


def truncated_split(good: Path, out: Path) -> Path:
    parts = [Path(shutil.copy(path, out)) for path in split_of(good)]
    assert len(parts) > 1
    with parts[1].open("r+b") as file:
        file.truncate(parts[1].stat().st_size - 1000)
    return parts[0]


def lying_name(good: Path, out: Path) -> Path:
    """What a converter of the field writes (peers.md, section 3): F16 weights, called Q4_K_M in name and keys."""
    kind = GGUFValue(int(LlamaFileType.MOSTLY_Q4_K_M), GGUFValueType.UINT32)
    return edit_gguf(gguf_of(good, "F16"), out / "Tiny-Q4_K_M.gguf", keys={"general.file_type": kind})


def fp8_embeddings(good: Path, out: Path) -> Path:
    """Codes and scales for the embeddings too; config.json still says that only Linear layers have them."""
    folder = out / "Tiny-FP8-dynamic"
    shutil.copytree(good / "whole" / "Tiny-FP8-dynamic", folder)
    name = "model.embed_tokens.weight"
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    weight = tensors[name].float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace(f'"{name}":', f'"{name}_scale": "{shard.name}", "{name}":')
        index.write_text(text)
    return folder


def template_replaced(model: Model, out: Path) -> Path:
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    keys = {"tokenizer.chat_template": GGUFValue(text, GGUFValueType.STRING)}
    return with_keys(model.gguf, out / model.gguf.name, keys)


def bos_flipped(model: Model, out: Path) -> Path:
    keys = {"tokenizer.ggml.add_bos_token": GGUFValue(False, GGUFValueType.BOOL)}
    return with_keys(model.gguf, out / model.gguf.name, keys)


def type_changed(model: Model, out: Path) -> Path:
    types = list(model.metadata["tokenizer.ggml.token_type"])
    types[model.metadata["tokenizer.ggml.tokens"].index("<|eot_id|>")] = int(TokenType.NORMAL)
    kinds = GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32)
    return with_keys(model.gguf, out / model.gguf.name, {"tokenizer.ggml.token_type": kinds})


WEIGHTS = {
    "rows of q and k not permuted": not_permuted,
    "one wrong scale": wrong_scale,
    "one tensor swapped": swapped,
    "rope_freqs left out": no_rope_freqs,
    "a truncated split": truncated_split,
    "an F16 file named Q4_K_M": lying_name,
    "embeddings quantized to FP8": fp8_embeddings,
}
PLANT = dict(zip(TOKENS_AND_CHAT, (template_replaced, bos_flipped, type_changed), strict=True))


# --- finding --------------------------------------------------------------------------------------------------------


def caught(variant: VariantReport, fault: Fault) -> bool:
    """Whether the check that the table names says so, in the words that it promises."""
    return any(
        (problem.check, problem.severity) == (fault.check, fault.severity) and fault.says in str(problem)
        for problem in variant.problems
    )


def test_the_table_is_complete() -> None:
    assert FAULTS.keys() == WEIGHTS.keys() | PLANT.keys()


def report_of(tiny: Path, variant: Path, folder: Path) -> Report:
    return validate(tiny, [variant], small_options(write_text(folder / "text.txt"), chunks=2, noise=()))


@pytest.mark.parametrize("kind", ["fp8", "split", "F16", "Q8_0", "Q4_K_M"])
def test_a_good_file_has_no_problem(kind: str, good: Path, tiny: Path, tmp_path: Path) -> None:
    """Without this, a check that always complains would catch everything."""
    paths = {"fp8": good / "whole" / "Tiny-FP8-dynamic", "split": split_of(good)[1]}
    found = report_of(tiny, paths.get(kind) or gguf_of(good, kind), tmp_path)
    assert found.variants[0].problems == ()
    assert all(gate.passed for gate in found.gate_results)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_fault_of_weights_is_found_and_named(name: str, good: Path, tiny: Path, tmp_path: Path) -> None:
    fault, folder = FAULTS[name], tmp_path / "made"
    folder.mkdir()
    found = report_of(tiny, WEIGHTS[name](good, folder), tmp_path)
    (variant,) = found.variants
    assert caught(variant, fault), variant.problems
    assert any(not gate.passed for gate in found.gate_results) == (fault.severity == "error")
    for page in (render_markdown(found, []), render_html(found, [])):
        assert fault.check in page
    assert report_view(found)


@requires_llama_cpp
@pytest.mark.long
def test_good_tokens_and_chats_have_no_problem(hermes_llama: Model) -> None:
    found = chat_check(open_variant(hermes_llama.source), [hermes_llama.gguf])
    assert found.errors == 0
    assert found.not_run == ()


@requires_llama_cpp
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "BOS flag flipped" else pytest.mark.long) for name in PLANT]
)
def test_a_fault_of_tokens_or_chat_is_found_and_named(name: str, hermes_llama: Model, tmp_path: Path) -> None:
    broken = PLANT[name](hermes_llama, tmp_path)
    found = chat_check(open_variant(hermes_llama.source), [broken])
    assert caught(found.variants[0], FAULTS[name]), found.variants[0].problems
    assert found.not_run == ()
