"""Checkpoints whose tensors have other names than their class gives them: wrappers of training tools, parents, no head.

The references: llama.cpp's converter where it takes such a checkpoint, and the plain checkpoint elsewhere; transformers
for FP8 folders.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from streamquant.convert.architectures.names import model_name
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import StreamquantError
from tests import gguf_peer, synthetic
from tests.attacks.harness import edit_json, pack, shards_of, unpack
from tests.conftest import TINY_PRE, Shelf, read_safetensors, write_small_tokenizer
from tests.gguf_peer import read_gguf

QWEN3 = synthetic.ARCHITECTURES[3]


def in_front(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def compiled_by_layer(name: str) -> str:
    return re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name)


STYLES: dict[str, Callable[[str], str]] = {
    "language_model": in_front("language_model."),
    "inner language_model": lambda name: name.replace("model.", "model.language_model.", 1),
    "no prefix": lambda name: name.removeprefix("model."),
    "torch.compile": in_front("_orig_mod."),
    "torch.compile by layer": compiled_by_layer,
    "peft": in_front("base_model.model."),
    "DDP": in_front("module."),
    "DDP of torch.compile": in_front("module._orig_mod."),
    "FSDP and checkpointing": lambda name: in_front("_fsdp_wrapped_module.")(
        name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")
    ),
    "Lightning": in_front("model."),
    "peft in torch.compile": in_front("_orig_mod.base_model.model."),
}
OF_THE_CONVERTER = ("language_model", "inner language_model", "no prefix")
"""Those that llama.cpp's converter takes, for these classes."""


def rename(folder: Path, style: Callable[[str], str]) -> Path:
    """Call the tensors of a checkpoint otherwise, in shards and index."""
    for path in shards_of(folder):
        header, data = unpack(path)
        path.write_bytes(pack({style(name) if name != "__metadata__" else name: e for name, e in header.items()}, data))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = {path.name: unpack(path)[0] for path in shards_of(folder)}
        names = {name: file for file, header in shards.items() for name in header if name != "__metadata__"}
        edit_json(index, weight_map=names)
    return folder


def write_plain(folder: Path, architecture: str) -> Path:
    tokenizer = write_small_tokenizer(folder.parent / "tokenizer", add_bos_token=True)
    return synthetic.write_checkpoint(folder, architecture=architecture, shards=2, tokenizer=tokenizer, size="small")


def converted(folder: Path, out: Path) -> Path:
    plan = make_plan(
        open_checkpoint(folder), parse_variants(["gguf:BF16", "fp8-dynamic"]), ConversionOptions(pre=TINY_PRE)
    )
    convert(plan, out, RunOptions(jobs=1))
    return out


@pytest.fixture(scope="module", params=synthetic.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(shelf: Shelf, architecture: str) -> Path:
    """A plain checkpoint, its variants beside it."""

    def make(folder: Path) -> None:
        converted(write_plain(folder / "Tiny", architecture), folder / "out")

    return shelf.get(f"plain-{architecture}", make)


@pytest.mark.parametrize("style", STYLES)
def test_variants_are_those_of_the_plain_checkpoint(style: str, plain: Path, architecture: str, tmp_path: Path) -> None:
    source = rename(write_plain(tmp_path / "Tiny", architecture), STYLES[style])
    assert any(name != model_name(name) for name in unpack(shards_of(source)[0])[0])
    out = converted(source, tmp_path / "out")
    (gguf,) = out.rglob("*.gguf")
    assert gguf.read_bytes() == next((plain / "out").rglob("*.gguf")).read_bytes()
    for path in sorted((plain / "out").rglob("*.safetensors")):
        assert read_safetensors(out / path.relative_to(plain / "out")) == read_safetensors(path)


def test_the_plan_says_so(tmp_path: Path) -> None:
    source = rename(write_plain(tmp_path / "Tiny", QWEN3), STYLES["torch.compile"])
    plan = make_plan(open_checkpoint(source), parse_variants(["fp8-dynamic"]))
    assert "'_orig_mod.model.embed_tokens.weight' is 'model.embed_tokens.weight'" in "\n".join(plan.notes)


@gguf_peer.requires_converter
def test_gguf_is_the_converter_s(tmp_path: Path) -> None:
    jobs, pairs = [], []
    for number, (style, architecture) in enumerate(
        [(style, architecture) for style in OF_THE_CONVERTER for architecture in (synthetic.ARCHITECTURES[0], QWEN3)]
    ):
        if (style, architecture) == ("no prefix", synthetic.ARCHITECTURES[0]):
            continue  # the converter does so for qwen3 and for classes without a head
        source = rename(write_plain(tmp_path / str(number) / "Tiny", architecture), STYLES[style])
        theirs = tmp_path / f"{number}.gguf"
        jobs.append(gguf_peer.Job(str(source), "bf16", str(theirs), pre=TINY_PRE))
        pairs.append((converted(source, tmp_path / str(number) / "out"), theirs))
    gguf_peer.convert_many(jobs)
    for out, theirs in pairs:
        (ours,) = out.rglob("*.gguf")
        assert read_gguf(ours) == read_gguf(theirs)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "Tiny", QWEN3)
    first, second = shards_of(source)
    header, data = unpack(first)
    moved = next(name for name in unpack(second)[0] if name != "__metadata__")
    victim = next(name for name in header if name != "__metadata__")
    header[f"_orig_mod.{moved}"] = header.pop(victim)
    first.write_bytes(pack(header, data))
    (source / "model.safetensors.index.json").unlink()
    edited = {name: path.name for path in (first, second) for name in unpack(path)[0] if name != "__metadata__"}
    (source / "model.safetensors.index.json").write_text("{}")
    edit_json(source / "model.safetensors.index.json", weight_map=edited)
    with pytest.raises(StreamquantError, match="two tensors are the same tensor of the model"):
        open_checkpoint(source)
