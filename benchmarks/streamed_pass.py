"""The layer-streamed pass over one model: tokens and GB of weights a second, peak memory of the GPU.

    python -m benchmarks.streamed_pass MODEL --text FILE [--chunks 64] [--device cuda] [--dtype bf16]

It reads every weight once, so with enough tokens the GPU computes all the time, and with few the disk decides. It has
not run on a GPU yet; without one it says so and measures nothing, but on a CPU if asked.
"""

import argparse
import sys
import time
from pathlib import Path

from streamquant.model.corpus import read_corpus
from streamquant.model.forward import Head, Lane, Setting, run_layers
from streamquant.model.variants.open import open_variant


def main() -> int:
    """Measure and print one line; 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint folder, or any variant")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="of the text; default: the model's folder")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    arguments = parser.parse_args()
    import torch

    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no GPU to measure on: torch sees none. Nothing was measured.", file=sys.stderr)
        return 2
    lane = Lane(open_variant(arguments.model))
    corpus = read_corpus([arguments.text], arguments.tokenizer or arguments.model, arguments.context, arguments.chunks)
    setting = Setting(device=arguments.device, dtype=arguments.dtype)
    start = time.perf_counter()
    run_layers([lane], corpus.tokens, setting)
    layers = time.perf_counter() - start
    head, hidden = Head(lane, setting), lane.hidden
    assert hidden is not None
    for rows in hidden:
        head.logits(rows)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, tokens = time.perf_counter() - start, corpus.tokens.size
    device = torch.cuda.get_device_name() if on_gpu else arguments.device
    print(
        f"{device}, {arguments.dtype}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s;"
        f" layers {layers:.1f} s, {lane.bytes_read / layers / 1e9:.2f} GB of weights a second"
        + (f"; at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU" if on_gpu else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
