"""The figures in examples/hermes-*.yaml: of the plan of the published model, made from its shape.

`python -m tests.example_figures` writes them again; tests/publish/test_examples.py tells when that is needed.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.spool import spool_limit
from streamquant.files.sizes import human_bytes
from streamquant.hub.repo import HubRepo
from streamquant.publish.release.release_file import ReleaseFile, read_release
from streamquant.publish.release.release_run import ReleaseRun
from streamquant.publish.release.release_state import ReleaseState
from streamquant.publish.release.stages.imatrix import expected_imatrix
from tests import gguf_peer
from tests.shapes import SHAPES, write_shape

EXAMPLES = Path(__file__).parents[1] / "examples"
BEGIN, END = "# figures\n", "# figures end\n"
JOBS = 16


def shape_of(example: Path) -> str:
    """The name of the model that an example is about."""
    return read_release(example).model.partition("/")[2].partition("@")[0]


class _NothingCached:
    """In place of a repository of the Hub, of which nothing is in the local cache."""

    def cached(self, _path: str) -> None:
        """No file."""


def _on_hub(checkpoint: Checkpoint) -> HubCheckpoint:
    """The same, as if it were on the Hub and nothing of it in the client's cache."""
    known = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    return HubCheckpoint(**known, hub=cast(HubRepo, _NothingCached()))


def figures(file: ReleaseFile, checkpoint: Checkpoint) -> str:
    """Sizes, files, bits per weight, disk and memory of a release, as comment lines."""
    run = ReleaseRun(replace(file, model=str(checkpoint.folder)), ReleaseState(Path("/nonexistent")))
    stage = file.imatrix
    imatrix = expected_imatrix(checkpoint, f"{run.name}.imatrix.gguf", stage) if stage else None
    plan = run.plan(imatrix)
    lines = [f"source        {human_bytes(checkpoint.nbytes):>10}  in {len(checkpoint.files)} shards"]
    for variant in plan.variants:
        count, bits = len(variant.files), plan.bits_per_weight(variant)
        size, files = human_bytes(plan.variant_bytes(variant)), f"{count} file{'s' if count > 1 else ''}"
        lines.append(f"{variant.recipe.spec:<13} {size:>10}  {bits:5.2f} bits per weight, {files}")
    spool = spool_limit(_on_hub(checkpoint), file.spool_gib)
    whole = plan.nbytes + sum(shard.size for shard in checkpoint.files)
    lines += [
        f"disk          {human_bytes(plan.nbytes):>10}  for the variants",
        f"              {human_bytes(plan.nbytes + spool):>10}  with shards on their way from the Hub",
        f"              {human_bytes(whole):>10}  with the whole source, which imatrix and validate read",
        f"memory        {human_bytes(plan.memory_bytes(JOBS)):>10}  while converting, with {JOBS} jobs",
    ]
    return "".join(f"#   {line}\n" for line in lines)


def with_figures(text: str, made: str) -> str:
    """The text of an example with other figures."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def main() -> int:
    """Write the figures of all examples again."""
    data = gguf_peer.data_folder()
    if data is None:
        sys.stderr.write("no shared test data: set STREAMQUANT_DATA\n")
        return 1
    for example in sorted(EXAMPLES.glob("hermes-*.yaml")):
        name = shape_of(example)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = open_checkpoint(write_shape(SHAPES[name], Path(folder) / name, data))
            made = figures(read_release(example), checkpoint)
        example.write_text(with_figures(example.read_text(), made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
