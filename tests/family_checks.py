"""What every family is compared with: llama.cpp's newest converter, llama-quantize and llama.cpp itself, transformers.

Test files of families bring cases, name -> keys of config.json, and a function that writes the checkpoint of one.
"""

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from streamquant.calibrate.importance import InputSums
from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.model.forward import Lane, Setting, all_logits, run_layers
from streamquant.model.variants.open import open_variant
from streamquant.validate.engines.agreement import engine_agreement
from streamquant.validate.engines.check import last_logits
from streamquant.validate.engines.process import EngineProcess
from streamquant.validate.readback.verify import verify
from tests import llama_cpp
from tests.conftest import TINY_PRE, Shelf, write_small_tokenizer
from tests.gguf_peer import Job, OutType, convert_many, read_gguf

OPTIONS = ConversionOptions(pre=TINY_PRE)
OUTTYPES: tuple[OutType, ...] = ("f32", "bf16", "q8_0")
SPECS = ("gguf:F32,BF16,Q8_0", "fp8-dynamic")
FILE_TYPES = ("Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE")
"""Those of llama-quantize that are compared."""
LARGEST_DIVERGENCE = 1e-5
"""From llama.cpp's probabilities, of one prompt; both sides compute in float32."""
CLOSE = 1e-4
"""Difference of logits, of the largest one: the same sums in another order."""
C = TypeVar("C")


# --- making checkpoints and files ------------------------------------------------------------------------------------


def randomize(parameters: Iterable[torch.Tensor], spread: float = 0.1) -> None:
    """Fill with normal values: matrices of this spread, vectors of 0.3."""
    generator = torch.Generator().manual_seed(1)
    for tensor in parameters:
        values = torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(values * (spread if tensor.ndim > 1 else 0.3))


def add_tokenizer(folder: Path, special: Sequence[str] = ()) -> None:
    """Put a small tokenizer into a checkpoint."""
    tokenizer = write_small_tokenizer(folder.parent / f"{folder.name}-tokenizer", special=special, add_bos_token=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def convert_case(source: Path, out: Path, specs: Sequence[str] = SPECS) -> None:
    """The variants of a checkpoint."""
    options = OPTIONS if (source / "tokenizer.json").is_file() else ConversionOptions()
    convert(make_plan(open_checkpoint(source), parse_variants(specs), options), out, RunOptions(jobs=2))


def make_sources(shelf: Shelf, family: str, cases: Mapping[str, C], write: Callable[[Path, C], Path]) -> Path:
    """The folder with the checkpoint of each case."""

    def make(folder: Path) -> None:
        for name, case in cases.items():
            write(folder / name, case)

    return shelf.get(f"{family}-sources", make)


def make_variants(shelf: Shelf, family: str, sources: Collection[Path], specs: Sequence[str] = SPECS) -> Path:
    """The folder with the variants of each checkpoint."""

    def make(folder: Path) -> None:
        for source in sources:
            convert_case(source, folder, specs)

    return shelf.get(f"{family}-variants", make)


def make_references(
    shelf: Shelf,
    family: str,
    sources: Collection[Path],
    outtypes: Sequence[OutType] = OUTTYPES,
    without_mtp: Collection[str] = (),
) -> Path:
    """The folder with the newest converter's files, CASE-OUTTYPE.gguf.

    It counts layers for multi-token prediction by config.json, and is told of the cases that lost their tensors.
    """

    def make(folder: Path) -> None:
        jobs = [
            Job(str(source), outtype, str(folder / f"{source.name}-{outtype}.gguf"), TINY_PRE, newest=True, more=more)
            for source in sources
            for more in [("--no-mtp",) if source.name in without_mtp else ()]
            for outtype in outtypes
        ]
        convert_many(sorted(jobs, key=lambda job: job.more))  # the option stays for the rest of a process

    return shelf.get(f"{family}-references", make)


def gguf_of(variants: Path, case: str, kind: str) -> Path:
    """A file of a case, e.g. of kind "BF16"."""
    return variants / f"{case}-GGUF" / f"{case}-{kind}.gguf"


def some_tokens() -> NDArray[Any]:
    """int64[2, 64], of those that the small tokenizer has."""
    return np.arange(128).reshape(2, 64) * 7 % 256


# --- comparing -------------------------------------------------------------------------------------------------------


def resident_logits(
    folder: Path, tokens: NDArray[Any], loader: Any = AutoModelForCausalLM, **more: Any
) -> torch.Tensor:
    """What transformers computes in float32."""
    model = loader.from_pretrained(folder, dtype=torch.float32, **more).float().eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.from_numpy(tokens)).logits
    return logits


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same but for the order of sums."""
    return bool((found - expected).abs().max() < CLOSE * expected.abs().max())


def gguf_logits(path: Path) -> torch.Tensor:
    """Those of a GGUF in which nothing may be wrong, of float32 inputs."""
    variant = open_variant(path)
    assert variant.problems == []
    return all_logits(variant, some_tokens(), Setting(weights_only=True))


def divergence(source: Path, gguf: Path) -> float:
    """The largest divergence of llama.cpp's probabilities from those of a checkpoint or file, over some prompts."""
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 250, length).tolist() for length in (8, 32, 64)]
    logits = last_logits(open_variant(source), prompts, Setting())
    with EngineProcess(gguf) as engine:
        return engine_agreement(engine, prompts, logits).max_kld


def check_verifies(folder: Path, source: Path, sqnr_db: float = 25) -> None:
    """The variants of a folder have no problem against their source, and no more than so much noise."""
    for result in verify(folder, open_checkpoint(source)):
        assert result.problems == []
        assert result.total.sqnr_db > sqnr_db


def check_loads_in_transformers(folder: Path, source: Path, loader: Any = AutoModelForCausalLM) -> None:
    """An FP8 folder's modules all have their weights, and what transformers computes with it is what we emulate.

    transformers does not quantize the inputs of experts, whose tensors it fuses, and a little noise chooses others; and
    a model that also sees stays in BF16. These must be nearer to the emulation than to the source.
    """
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    left = {name for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for name in info[kind]}
    assert {name for name in left if name != "lm_head.weight" and not name.startswith("mtp.")} == set()
    with torch.inference_mode():
        found = model(torch.from_numpy(some_tokens())).logits.float()
    variant, original = open_variant(folder), all_logits(open_variant(source), some_tokens(), Setting())
    emulated = all_logits(variant, some_tokens(), Setting())
    if variant.description.family.experts is None and variant.description.family.multimodal is None:
        assert is_close(found, emulated)
    else:
        assert (found - emulated).square().mean() < 0.7 * (found - original).square().mean()
    assert (found - original).square().mean() < 0.2 * original.square().mean()


def check_importance(source: Path, gguf: Path, without: Collection[str] = ()) -> None:
    """An importance matrix has an entry for each matrix of the layers, experts together, but for these endings."""
    variant = open_variant(source)
    rules = {
        name.removesuffix(".weight"): rule for name, rule in variant.description.rules.items() if rule.has_importance
    }
    sums = InputSums(rules)
    run_layers([Lane(variant, on_input=sums.observe)], some_tokens(), Setting())
    matrices = {
        name: shape
        for name, (_, shape, _) in read_gguf(gguf)[1].items()
        if name.startswith("blk.") and len(shape) > 1 and not name.endswith(tuple(without))
    }
    assert set(sums.sums) == set(matrices)
    for name, found in sums.sums.items():
        assert found.shape == (math.prod(matrices[name][:-2]), matrices[name][-1])


def check_equals_llama_quantize(source: Path, out: Path, flags: Sequence[str] = ()) -> None:
    """The tensors of each of FILE_TYPES are those that llama-quantize makes of the file in BF16."""
    convert_case(source, out, [f"gguf:BF16,{','.join(FILE_TYPES)}"])
    for kind in FILE_TYPES:
        theirs = llama_cpp.quantize(gguf_of(out, source.name, "BF16"), out / f"{kind}.gguf", kind, flags)
        assert read_gguf(gguf_of(out, source.name, kind))[1] == read_gguf(theirs)[1]
        assert open_variant(theirs).problems == []
