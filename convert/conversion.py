"""The main job: a checkpoint folder in, folders of variants out. Plan, check, stream, then the small files.

out/NAME-GGUF/NAME-Q8_0.gguf ...      out/NAME-FP8-dynamic/model-00001-of-00002.safetensors, config.json ...
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.convert.manifest import MANIFEST, complete_variants, is_of_same_source, write_manifests
from streamquant.convert.metadata.guard_template import bos_text, guard_side_file
from streamquant.convert.options import RunOptions
from streamquant.convert.plan.disk import Disk, peak_disk
from streamquant.convert.plan.planner import make_plan
from streamquant.convert.plan.records import Plan, VariantPlan
from streamquant.convert.recipes.quantization_config import QuantizationConfigs, with_ignored
from streamquant.convert.run.blocks import Encode
from streamquant.convert.run.delivery import Delivery
from streamquant.convert.run.device import choose_device, inner_loop
from streamquant.convert.run.journal import WORK_FOLDER, Journal
from streamquant.convert.run.stream import CONVERTING, RunResources, head_of, run
from streamquant.convert.source.hub_checkpoint import HubCheckpoint, fetch_side_files
from streamquant.convert.source.open import pin, unpin
from streamquant.convert.source.shards import LocalShards
from streamquant.convert.source.side_files import read_side_file
from streamquant.convert.source.spool import Spool, spool_limit
from streamquant.convert.source.weights import CONFIG, INDEX, SINGLE_FILE
from streamquant.files.folders import nearest_folder, real_path
from streamquant.files.listener import SILENT, Listener
from streamquant.files.machine import allow_open_files
from streamquant.files.strict_json import read_json_object
from streamquant.files.writing import (
    PARTIAL,
    check_folder,
    check_writable,
    explain,
    make_folder,
    partial_of,
    write_atomically,
)
from streamquant.quant.errors import StreamquantError, UsageError
from streamquant.quant.formats import FORMATS

SPOOL = f"{WORK_FOLDER}/spool"
"""Where shards of the Hub lie, below --out."""
DISK_RESERVE = 64 * 1024 * 1024
"""Bytes beyond the plan: journal, tokenizer, manifests, and what the file system itself needs."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a run did."""

    plan: Plan
    """All variants that were asked for."""
    already_done: tuple[str, ...]
    """Variants that an earlier run had completed."""
    resumed_chunks: int
    """Chunks that an earlier, unfinished run had written."""


def convert(
    plan: Plan,
    out: Path,
    options: RunOptions | None = None,
    listener: Listener = SILENT,
    delivery: Delivery | None = None,
) -> Conversion:
    """Make every variant of a plan below `out` from one read of the checkpoint.

    `listener` hears of the plan of what is left to do, then of the tasks "converting" and, of a model on the Hub,
    "fetching". `delivery` takes finished files away. Raises UsageError or StreamquantError; a repeated call goes on
    where this one stopped.
    """
    options = options or RunOptions()
    encode = inner_loop(choose_device(options.device))
    check_output_folder(plan, out)
    allow_open_files(len(plan.checkpoint.files) + len(plan.files))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Journal(out)) as journal:
            rest, done = _what_is_left(plan, out, journal, delivery)
            resumed = _Job(out, options, listener, delivery, encode).run(rest, journal) if rest else 0
            if rest is not None or _is_finished(plan, journal):
                journal.remove()
                shutil.rmtree(out / SPOOL, ignore_errors=True)
                unpin(out)
    except OSError as error:
        raise explain(error, out) from error
    return Conversion(plan, done, resumed)


def check_output_folder(plan: Plan, out: Path) -> None:
    """Raise UsageError if `out` is a file, or if it or a folder that the plan needs in it lies inside the source, or
    elsewhere through a link; StreamquantError if they cannot be looked at.
    """
    try:
        _check_output_folder(plan, out)
    except OSError as error:
        raise explain(error, out) from error


def _check_output_folder(plan: Plan, out: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        found = f"a link to {out.readlink()}, which is no folder" if out.is_symlink() else "a file"
        raise UsageError(
            "the output folder is a file", where=str(out), found=found, required="a folder, or a name not taken yet"
        )
    folders = {*(variant.folder for variant in plan.variants), *(str(Path(file.path).parent) for file in plan.files)}
    for variant in plan.variants:
        if variant.recipe.container.is_checkpoint:
            folders |= {str(Path(variant.folder, name).parent) for name in plan.checkpoint.side_files}
    places = [out / name for name in sorted(folders | {SPOOL})]
    for folder in (out, *places):
        if _is_inside(folder, plan.checkpoint.folder):
            raise UsageError(
                "the output folder lies inside the source",
                where=str(folder),
                required="a folder outside the checkpoint, which is never written to",
                hint="choose another --out or --name",
            )
    for folder in places:
        check_folder(folder, out)
        names = [Path(file.path).name + PARTIAL for file in plan.files if out / Path(file.path).parent == folder]
        check_writable(folder, names)


def _is_inside(folder: Path, source: Path) -> bool:
    """Whether a folder, there or not, is the source or lies below it, under whatever name (links, mounts)."""
    found = real_path(folder)
    return any(above == source or (above.exists() and above.samefile(source)) for above in (found, *found.parents))


def check_disk(plan: Plan, out: Path, disk: Disk | None = None) -> None:
    """Raise StreamquantError if the disk of `out` cannot hold the plan. Looks at the nearest folder that exists.

    `disk` is what the run takes at most (default: all files), of which what is there already is not needed again.
    """
    present = sum(_allocated(out / file.path) for file in plan.files)
    present += sum(path.stat().st_blocks * 512 for path in (out / SPOOL).glob("*") if path.is_file())
    free = shutil.disk_usage(nearest_folder(real_path(out))).free
    needed = (disk or Disk(plan.nbytes)).peak - present + DISK_RESERVE
    if free < needed:
        check_writable(out, try_it=True)  # /sys and /proc have no space and take no files
        raise StreamquantError(
            "not enough disk space",
            where=str(out),
            found=f"{free:,} bytes free",
            required=f"{needed:,} bytes",
            hint="free some space, choose another --out, or make fewer variants at a time",
        )


def disk_of(plan: Plan, options: RunOptions, room: int | None = None) -> Disk:
    """What a run of the plan takes on the disk at most; `room` are the bytes that may wait for a delivery which deletes
    what it has delivered. Raises UsageError for a spool smaller than a shard.
    """
    spool = _spool_bytes(plan, options)
    everything = plan.nbytes + spool
    if room is None:
        return Disk(everything, spool)
    peak = peak_disk(plan, room, spool, delete=True, jobs=options.jobs)
    return Disk(min(everything, peak), spool, delivered=True)


def _spool_bytes(plan: Plan, options: RunOptions) -> int:
    """The most bytes of shards of the Hub on the disk; raises UsageError."""
    source = plan.checkpoint
    return spool_limit(source, options.spool_gib, plan.readings) if isinstance(source, HubCheckpoint) else 0


def _allocated(final: Path) -> int:
    """Bytes that a file of an earlier run already takes on the disk."""
    for path in (final, partial_of(final)):
        with contextlib.suppress(OSError):
            return path.stat().st_blocks * 512
    return 0


def _what_is_left(
    plan: Plan, out: Path, journal: Journal, delivery: Delivery | None
) -> tuple[Plan | None, tuple[str, ...]]:
    """The plan without the variants that are complete (None: all are), and their names.

    An unfinished run of the whole plan is resumed as a whole: some of its manifests may be written already.
    """
    if (head := journal.head()) is not None and head.fingerprint == plan.fingerprint:
        return plan, ()
    done = tuple(variant.recipe.spec for variant in complete_variants(out, plan, delivery))
    recipes = [variant.recipe for variant in plan.variants if variant.recipe.spec not in done]
    if not done:
        return plan, ()
    return (make_plan(plan.checkpoint, recipes, plan.options) if recipes else None), done


def _is_finished(plan: Plan, journal: Journal) -> bool:
    """Whether the journal is that of a run that had written everything; `plan` is complete."""
    head = journal.head()
    return head is None or head.variants.items() <= head_of(plan).variants.items()


@dataclass(frozen=True, slots=True)
class _Job:
    """How one call of `convert` does its work."""

    out: Path
    options: RunOptions
    listener: Listener
    delivery: Delivery | None
    encode: Encode

    def run(self, plan: Plan, journal: Journal) -> int:
        """Make everything of the plan; returns the chunks that an earlier run had written."""
        out, checkpoint = self.out, plan.checkpoint
        if journal.head() is None:
            _check_folders_are_ours(plan, out)
            if isinstance(checkpoint, HubCheckpoint):
                pin(out, checkpoint.hub)  # for as long as this run is unfinished
        with contextlib.ExitStack() as stack:
            shards = stack.enter_context(contextlib.closing(self._shards(plan)))
            room = self.delivery.room if self.delivery is not None and self.delivery.delete else None
            check_disk(plan, out, disk_of(plan, self.options, room))
            schemes = [variant.recipe.scheme for variant in plan.variants if variant.recipe.scheme is not None]
            has_folders = any(variant.recipe.container.is_checkpoint for variant in plan.variants)
            if has_folders and isinstance(checkpoint, HubCheckpoint):
                fetch_side_files(checkpoint)
            configs = stack.enter_context(contextlib.closing(QuantizationConfigs(schemes)))
            self.listener.planned(plan)
            self.listener.started(CONVERTING, sum(m.source.stop - m.source.start for m in plan.matrices), "bytes")
            resources = RunResources(self.options.jobs, self.encode, shards, self.delivery, self.listener)
            written = run(plan, out, journal, resources)
            for variant in plan.variants:
                if variant.recipe.container.is_checkpoint:
                    _write_checkpoint_files(plan, variant, out, configs)
            write_manifests(out, plan, written)
            if isinstance(shards, Spool):
                shards.remove()
        return written.resumed_chunks

    def _shards(self, plan: Plan) -> Spool | LocalShards:
        """The bytes of the source."""
        checkpoint = plan.checkpoint
        if isinstance(checkpoint, HubCheckpoint):
            return Spool(checkpoint, self.out / SPOOL, _spool_bytes(plan, self.options), self.listener)
        return LocalShards(checkpoint)


def _check_folders_are_ours(plan: Plan, out: Path) -> None:
    """Refuse folders and files that this run did not make: nothing is overwritten or mixed."""
    for file in plan.files:
        if os.path.lexists(out / file.path):
            raise _taken(out / file.path)
    for variant in plan.variants:
        folder = out / variant.folder
        if not is_of_same_source(folder, plan):
            raise StreamquantError(
                "the output folder holds variants of another source",
                where=str(folder / MANIFEST),
                required=f"variants of {plan.checkpoint.source} alone",
                hint="choose another --out or --name, or move the folder away",
            )
        if variant.recipe.container.is_checkpoint and folder.exists():
            others = [path for path in folder.iterdir() if not path.name.endswith(PARTIAL)]
            if others:
                raise _taken(others[0])


def _taken(path: Path) -> StreamquantError:
    return StreamquantError(
        "the output folder holds another run's files",
        where=str(path),
        found="a file that this plan did not make",
        hint="choose another --out or --name, or move the files away",
    )


def _write_checkpoint_files(plan: Plan, variant: VariantPlan, out: Path, configs: QuantizationConfigs) -> None:
    """Everything of a checkpoint that is not weights: side files, the index, and config.json last of all."""
    folder, source = out / variant.folder, plan.checkpoint.folder
    bos_token = bos_text(_tokenizer_config(plan)) if plan.options.guard_template else None
    for name in plan.checkpoint.side_files:
        make_folder((folder / name).parent, out)
        content = read_side_file(source, name)
        if plan.options.guard_template:
            content = guard_side_file(name, content, bos_token)
        write_atomically(folder / name, content)
    if [Path(plan.files[number].path).name for number in variant.files] != [SINGLE_FILE]:
        write_atomically(folder / INDEX, _json(_index(plan, variant)))
    write_atomically(folder / CONFIG, _json(_config(plan, variant, configs)))


def _config(plan: Plan, variant: VariantPlan, configs: QuantizationConfigs) -> dict[str, Any]:
    """config.json of a checkpoint: the source's, with the quantization of the variant, or the dtype of its weights."""
    config, scheme = dict(plan.checkpoint.config), variant.recipe.scheme
    if scheme is not None:
        ignored = (*plan.model.unquantized, *plan.options.ignore)
        return {**config, "quantization_config": with_ignored(configs[scheme], ignored)}
    return {**config, "torch_dtype" if "torch_dtype" in config else "dtype": "bfloat16"}


def _tokenizer_config(plan: Plan) -> dict[str, Any]:
    path = plan.checkpoint.folder / "tokenizer_config.json"
    return read_json_object(path) if path.is_file() else {}


def _index(plan: Plan, variant: VariantPlan) -> dict[str, object]:
    stored = {
        tensor.name + part.suffix: Path(plan.files[region.file].path).name
        for tensor in variant.tensors
        for part, region in zip(FORMATS[tensor.format].parts, tensor.regions, strict=True)
    }
    stored |= {name: Path(plan.files[region.file].path).name for name, region in variant.generated_at.items()}
    total = sum(tensor.nbytes for tensor in variant.tensors)
    total += sum(region.nbytes for region in variant.generated_at.values())
    return {"metadata": {"total_size": total}, "weight_map": stored}


def _json(value: object) -> bytes:
    """As llm-compressor and transformers write it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
