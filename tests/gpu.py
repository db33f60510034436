"""GPU kernels for the tests: on a GPU if there is one, else in Triton's interpreter, in a process of its own.

The interpreter is chosen by an environment variable before Triton is imported, for good; so a second process has it and
the process of the tests stays as it is. Functions of this module run in either.
"""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from streamquant.convert.conversion import convert
from streamquant.convert.options import ConversionOptions, RunOptions
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.recipes.recipe import parse_variants
from streamquant.convert.run import device
from streamquant.convert.source.checkpoint import open_checkpoint
from streamquant.quant import gpu
from streamquant.quant.format import NO_OVERFLOW, Encoded, Importance, Rows
from streamquant.quant.formats import FORMATS

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[..., Any]


def interpret() -> None:
    """For a new process: kernels run in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@contextmanager
def caller() -> Iterator[Call]:
    """A function that calls one of this module where the kernels can run: call(function, *arguments)."""
    if DEVICE == "cuda":
        yield lambda function, *arguments: function(*arguments)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=interpret) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def encode(name: str, rows: Rows, importance: Importance | None = None) -> tuple[Encoded, int]:
    """What the GPU encoder of a format makes of float32[r, n]: its parts, and the first overflowing row or -1."""
    overflow = torch.tensor([NO_OVERFLOW], dtype=torch.int32, device=DEVICE)
    parts = tuple(torch.full(part.shape, 0xAA, dtype=torch.uint8) for part in FORMATS[name].allocate(*rows.shape))
    parts = tuple(part.to(DEVICE) for part in parts)
    weights = None if importance is None else torch.tensor(importance, device=DEVICE)
    gpu.encode(name, torch.tensor(rows, device=DEVICE), parts, overflow, weights)
    first = int(overflow.item())
    return tuple(part.cpu().numpy() for part in parts), -1 if first == NO_OVERFLOW else first


def convert_on_device(
    folder: Path, out: Path, variants: list[str], options: ConversionOptions, block: int, left_to_cpu: frozenset[str]
) -> str | None:
    """Convert with the GPU's inner loop, in blocks of so many weights; the text of the error, None if there is none.

    The formats `left_to_cpu` are treated as if they had no GPU encoder.
    """
    with (
        mock.patch("streamquant.convert.conversion.inner_loop", return_value=device.DeviceEncoder(DEVICE)),
        mock.patch(
            "streamquant.convert.recipes.quantization_config._read_cache",
            lambda scheme: {"config_groups": {scheme: {}}},
        ),
        mock.patch.object(device, "BLOCK_WEIGHTS", block),
        mock.patch.object(gpu, "ENCODED", gpu.ENCODED - left_to_cpu),
        np.errstate(all="ignore"),
    ):
        try:
            convert(make_plan(open_checkpoint(folder), parse_variants(variants), options), out, RunOptions(jobs=2))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def convert_on_wrong_device(folder: Path, out: Path, variants: list[str], wrong: str) -> str | None:
    """As `convert_on_device`, on a device that gets one byte of the format `wrong` wrong."""
    encode_right = gpu.encode

    def encode_wrong(name: str, rows: torch.Tensor, parts: tuple[torch.Tensor, ...], *more: Any) -> None:
        encode_right(name, rows, parts, *more)
        if name == wrong:
            parts[0][-1, -1] ^= 1

    with mock.patch.object(gpu, "encode", encode_wrong):
        return convert_on_device(folder, out, variants, ConversionOptions(), 1 << 30, frozenset())
