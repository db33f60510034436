"""The GPU's inner loop gives the files and the errors of the CPU's, whatever the size of its blocks."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.imatrix import ImportanceMatrix
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.run import device
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant.errors import UsageError
from tests import quantized_sources
from tests.attacks.harness import checksums, entry, poke, shards_of, unpack, write_model
from tests.conftest import TINY_PRE
from tests.gpu import HAS_TRITON, Call, caller, convert_on_device, convert_on_wrong_device

VARIANTS = ["gguf:Q8_0,Q4_0,F16,F32,BF16", "fp8-dynamic", "fp8-block"]
MIXES = ["gguf:Q4_K_M,Q2_K,Q3_K_M,Q5_K_M,IQ4_XS,Q5_1"]
WHOLE = 1 << 30
NONE: frozenset[str] = frozenset()

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it has wheels for Linux alone)")


@pytest.fixture(scope="module", autouse=True)
def _known_configs() -> Iterator[None]:
    """The quantization_config is not what is tested here, and asking compressed-tensors for it takes 5 seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "streamquant.convert.recipes.quantization_config._read_cache",
            lambda scheme: {"config_groups": {scheme: {}}},
        )
        yield


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with caller() as function:
        yield function


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "Tiny", shards=2)


@dataclass(frozen=True)
class Both:
    """Convert on the CPU and with the GPU's inner loop."""

    call: Call
    folder: Path

    def convert(
        self,
        model: Path,
        variants: list[str],
        *,
        block: int = WHOLE,
        options: ConversionOptions | None = None,
        left: frozenset[str] = NONE,
    ) -> str | None:
        """The same files, or the same error, which is returned."""
        options = options or ConversionOptions()
        error = None
        try:
            convert(
                make_plan(open_checkpoint(model), parse_variants(variants), options),
                self.folder / "cpu",
                RunOptions(jobs=2),
            )
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        found = self.call(convert_on_device, model, self.folder / "gpu", variants, options, block, left)
        assert found == error
        if error is None:
            assert checksums(self.folder / "cpu") == checksums(self.folder / "gpu")
        return error


@pytest.fixture
def both(call: Call, tmp_path: Path) -> Both:
    return Both(call, tmp_path)


@needs_triton
@pytest.mark.parametrize("block", [WHOLE, 5_000])
def test_same_files(both: Both, model: Path, block: int) -> None:
    """Blocks of a few rows: both slots are in use, and the last is shorter."""
    assert both.convert(model, VARIANTS, block=block) is None


@needs_triton
def test_same_files_of_a_quantized_source(both: Both, tmp_path: Path) -> None:
    """FP8 of another kind rounds first, of the same kind is copied; the last block of rows begins within a tile."""
    source = quantized_sources.quantize(quantized_sources.write_source(tmp_path / "Tiny", num_hidden_layers=1))
    variants = ["fp8-dynamic", "fp8-block", "bf16", "gguf:Q4_0"]
    both.convert(source, variants, block=20_000, options=ConversionOptions(pre=TINY_PRE))


@needs_triton
def test_same_files_where_formats_are_left_to_the_cpu(both: Both, model: Path) -> None:
    both.convert(model, VARIANTS, block=20_000, left=frozenset({"Q4_0", "F16", "FP8_BLOCK_BF16"}))


@needs_triton
@pytest.mark.long
def test_same_files_of_the_mixes(both: Both, tiny: Path) -> None:
    both.convert(tiny, MIXES, options=ConversionOptions(pre="llama-bpe"))


@needs_triton
def test_same_files_with_an_importance_matrix(both: Both, model: Path) -> None:
    """Of one tensor, whose rows change places."""
    name = "blk.1.attn_k.weight"
    plan = make_plan(open_checkpoint(model), parse_variants(["gguf:Q4_0"]))
    (matrix,) = (matrix for matrix in plan.matrices if matrix.outputs[0].name == name)
    importance = np.random.default_rng(0).random(matrix.n).astype(np.float32)
    importance.flags.writeable = False
    imatrix = ImportanceMatrix("some.gguf", "0" * 64, ("text",), 1, {name: importance})
    both.convert(model, ["gguf:Q4_0"], options=ConversionOptions(imatrix=imatrix))


@needs_triton
@pytest.mark.parametrize("wrong", ["Q8_0", "FP8_CHANNEL_BF16"])
def test_a_device_with_other_bytes_is_found(call: Call, model: Path, tmp_path: Path, wrong: str) -> None:
    error = call(convert_on_wrong_device, model, tmp_path / "out", ["gguf:Q8_0,F16", "fp8-dynamic"], wrong)
    assert f"the GPU's bytes of {wrong} are not the CPU's" in error
    assert "--device cpu" in error
    assert not list((tmp_path / "out").rglob("*.gguf"))


def damaged(model: Path, folder: Path, value: float) -> Path:
    """A copy of the model with one other weight: row 5, column 7 of a query projection."""
    copy = write_model(folder / "Tiny", shards=2)
    name = "model.layers.1.self_attn.q_proj.weight"
    for shard in shards_of(copy):
        header, data = unpack(shard)
        if name in header:
            start = shard.stat().st_size - len(data) + entry(header, name)[0]
            columns = header[name]["shape"][1]
            poke(shard, start + 2 * (5 * columns + 7), np.array([value], np.float32).tobytes()[2:])
    return copy


@needs_triton
@pytest.mark.parametrize("variants", ["gguf:BF16", "gguf:BF16,Q4_0,Q8_0"])
@pytest.mark.parametrize(("value", "block"), [(np.nan, WHOLE), (-np.inf, 5_000), (3e38, WHOLE), (3e38, 5_000)])
def test_same_error_for_a_bad_weight(
    both: Both, model: Path, tmp_path: Path, value: float, block: int, variants: str
) -> None:
    folder = damaged(model, tmp_path, value)
    error = both.convert(folder, [variants], block=block)
    if value == 3e38 and variants == "gguf:BF16":  # it fits, and is kept
        assert error is None
        return
    assert error is not None
    assert "q_proj.weight', row 5, column 7" in error
    assert not list((tmp_path / "gpu").rglob("*.gguf"))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown device\n.*--device\n.*'tpu'\n.*auto, cpu, cuda"):
        device.choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="cannot encode on a GPU") as error:
        device.choose_device("cuda")
    assert "without CUDA" in str(error.value) or "no GPU" in str(error.value) or "triton" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert device.choose_device("auto") == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_DRIVERS", ("/",))  # a driver, and no GPU that torch sees
        assert device.choose_device("auto") == "cpu"


def test_missing_triton_is_named() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(UsageError, match="triton is not installed"):
            device.choose_device("cuda")


def test_the_cpu_needs_no_torch() -> None:
    """torch takes seconds to import and hundreds of megabytes."""
    code = (
        "import sys\n"
        "from streamquant.convert import conversion\n"
        "from streamquant.convert.run import device\n"
        "device._DRIVERS = ()\n"
        "assert device.choose_device('auto') == device.choose_device('cpu') == 'cpu'\n"
        "device.inner_loop('cpu')\n"
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
