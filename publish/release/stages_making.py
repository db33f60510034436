"""The stages that make things: the plan, the importance matrix, the variants."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from streamquant.convert.architectures import TensorKind, describe
from streamquant.convert.conversion import Fetching, check_disk, check_output_folder, convert, default_jobs, disk_of
from streamquant.convert.manifest import MANIFEST, complete_variants, read_manifest
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.records import Plan, VariantPlan
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.run.device import choose_device
from streamquant.convert.source.checkpoint import CONFIG, INDEX, Checkpoint
from streamquant.convert.source.snapshot import check_cache, client_cache, missing_bytes
from streamquant.files.folders import nearest_folder
from streamquant.files.hashing import sha256_of
from streamquant.files.sizes import human_bytes
from streamquant.files.writing import explain
from streamquant.publish.release.release_file import ImatrixStage
from streamquant.publish.release.release_run import Outcome, Road, Work
from streamquant.publish.release.steps import Steps
from streamquant.publish.results import CARD, REPORT_FOLDER
from streamquant.quant.errors import StreamquantError


class PlanWork(Work):
    """Open the source, plan, check folder and disk. It is never skipped: it is what finds out that nothing changed."""

    name = "plan"

    def outcome(self) -> Outcome:
        """Always done; nothing is written."""
        plan, out = self.road.plan(imatrix_for_planning(self.road)), self.file.out
        check_output_folder(plan.checkpoint, out, [variant.folder for variant in plan.variants])
        notes = list(plan.notes)
        if self.file.push is not None:
            notes += self._check_push(plan)
        if len(complete_variants(out, plan)) < len(plan.variants):
            self._check_texts()
            notes += self._check_disk(plan)
        for note in notes:
            self.watch.on_note(note)
        sizes = ", ".join(f"{v.recipe.spec} {human_bytes(plan.variant_bytes(v))}" for v in plan.variants)
        memory = human_bytes(plan.memory_bytes(self.file.jobs or default_jobs()))
        room = self._room_for_source(plan)
        disk = human_bytes(plan.nbytes + room) + (f" ({human_bytes(room)} of it for the source)" if room else "")
        text = f"{sizes}; disk {disk}; memory about {memory}"
        return Outcome(self.name, "done", text)

    def _room_for_source(self, plan: Plan) -> int:
        """Bytes of a source of the Hub that lie on the disk: some shards, or all where a stage reads it as a whole."""
        spool = disk_of(plan, self.file.spool_gib).spool
        return max(spool, missing_bytes(plan.checkpoint)) if self._reads_all(plan) else spool

    def _reads_all(self, plan: Plan) -> bool:
        file = self.file
        matrix = file.imatrix is not None and file.imatrix.file is None
        verify = file.verify is not None and file.verify.source
        return plan.checkpoint.remote and (matrix or verify or file.validate is not None)

    def _check_disk(self, plan: Plan) -> Sequence[str]:
        """Raise StreamquantError if a disk is too small; in a dry run say so."""
        out = self.file.out
        try:
            if self._reads_all(plan) and client_cache().stat().st_dev != nearest_folder(out).stat().st_dev:
                check_cache(plan.checkpoint)
                check_disk(plan, out, disk_of(plan, self.file.spool_gib))
            else:
                check_disk(plan, out, Disk(plan.nbytes + self._room_for_source(plan)))
        except StreamquantError as error:
            if not self.road.dry_run:
                raise
            return [" ".join(str(error).split())]
        return ()

    def _check_push(self, plan: Plan) -> Sequence[str]:
        """Hours before the push: is every file small enough, and is there a token? Returns remarks."""
        from streamquant.hub.target import connect
        from streamquant.publish.upload.limits import check_plan

        if not self.road.dry_run and "push" in self.road.chosen and self.road.state["push"].done is None:
            connect()
        return check_plan(plan)

    def _check_texts(self) -> None:
        """Hours before the validation: can every text be read, and is it long enough?"""
        from streamquant.model.corpus import read_corpus

        stage = self.file.validate
        if stage is not None:
            read_corpus(stage.text, self.road.checkpoint.folder, stage.context, stage.chunks)

    def inputs(self) -> object:
        """It makes nothing."""
        return None

    def would(self) -> str:
        """It is done in a dry run too."""
        return ""

    def run(self) -> tuple[str, list[Path]]:
        """Never called."""
        return "", []


class ImatrixWork(Work):
    """The importance matrix over texts; or the look at one that was given."""

    name = "imatrix"

    @property
    def stage(self) -> ImatrixStage:
        """Its options."""
        assert self.file.imatrix is not None, "the stage is asked for"
        return self.file.imatrix

    @property
    def path(self) -> Path:
        """Where it is."""
        path = self.road.imatrix_path
        assert path is not None, "the stage is asked for"
        return path

    def inputs(self) -> object:
        """Source, texts, how they are cut, versions; or the file that was given."""
        stage = self.stage
        if stage.file is not None:
            return [str(stage.file), sha256_of(stage.file)]
        texts = [[path.name, sha256_of(path)] for path in stage.text]
        options = [stage.context, stage.chunks, stage.dtype, self.file.device]
        return [self.road.source, self.path.name, texts, options, self.road.versions()]

    def before(self) -> None:
        """Clear the way for a new file: one of other inputs would be continued, or refused as another's."""
        entry, path = self.entry, self.path
        unfinished = entry.begun == self.key and entry.done is None  # of a run that was killed: it is continued
        if self.stage.file is not None or entry.begun is None or unfinished or not path.exists():
            return
        if entry.done is None or self.road.state.is_intact(self.name):
            path.unlink()
        else:  # somebody changed it since
            path.replace(path.with_name(path.name + ".old"))
            self.watch.on_note(f"{path.name} is not as it was made: kept as {path.name}.old, and made again")

    def found(self) -> str | None:
        """The file, if it is that of these inputs."""
        return None if super().found() is None else str(self.path)

    def would(self) -> str:
        """What would be computed."""
        if self.stage.file is not None:
            return f"take {self.stage.file}"
        chunks = f"{self.stage.chunks} chunks of {self.stage.context} tokens" if self.stage.chunks else "all"
        return f"compute {self.path} over {', '.join(path.name for path in self.stage.text)}: {chunks} of each"

    def run(self) -> tuple[str, list[Path]]:
        """Compute it; one that a killed run left is continued."""
        if self.stage.file is not None:
            found = read_imatrix(self.stage.file)
            return f"{len(found.entries)} entries over {found.chunk_count} chunks in {found.name}", [self.stage.file]
        from streamquant.calibrate.importance import ImportanceOptions, write_importance
        from streamquant.model.corpus import read_corpus
        from streamquant.model.variants.open import open_variant

        variant = open_variant(self.road.weights)
        corpus = read_corpus(self.stage.text, variant.path, self.stage.context, self.stage.chunks)
        done = write_importance(
            variant,
            corpus,
            self.path,
            ImportanceOptions(self.road.setting(self.stage.dtype), self.stage.save_every),
            Steps(self.watch.on_step, "importance matrix: "),
        )
        resumed = f", {done.resumed_from} of them from before" if done.resumed_from else ""
        return f"{done.entries} tensors over {done.chunks} chunks{resumed} in {self.path}", [self.path]


class ConvertWork(Work):
    """All variants from one read. What is complete is known by the manifests, so that the key is the plan's own."""

    name = "convert"

    @cached_property
    def plan(self) -> Plan:
        """With the importance matrix that is there, or in a dry run will be."""
        return self.road.plan(imatrix_for_planning(self.road) if self.road.pending else self.road.imatrix())

    def inputs(self) -> object:
        """The plan's fingerprint covers the source, the importance matrix, options and addresses."""
        return self.plan.fingerprint

    def _complete(self) -> list[VariantPlan]:
        return complete_variants(self.file.out, self.plan)

    def found(self) -> str | None:
        """All variants, if all are complete; whoever made them."""
        if len(self._complete()) < len(self.plan.variants):
            return None
        self._remember()
        return self._sizes(self.plan.variants)

    def _sizes(self, variants: Sequence[VariantPlan]) -> str:
        return ", ".join(f"{v.recipe.spec} {human_bytes(self.plan.variant_bytes(v))}" for v in variants)

    def _remember(self) -> None:
        """Which folders the release has, and the fingerprints that are ours to replace."""
        made = self.entry.made
        folders = sorted({variant.folder for variant in self.plan.variants})
        if made.get("folders") != folders and not self.road.dry_run:
            made["folders"] = folders
            self.road.state.write()

    def before(self) -> None:
        """Remove the variants that this release made of other inputs."""
        ours = set(self.entry.made.get("ours", []))
        complete = {variant.recipe.spec for variant in self._complete()}
        try:
            for variant in self.plan.variants:
                if variant.recipe.spec not in complete:
                    self._remove_obsolete(variant, ours)
        except OSError as error:
            raise explain(error, self.file.out) from error
        prints = [self.plan.variant_fingerprint(v) for v in self.plan.variants if v.recipe.spec not in complete]
        self.entry.made["ours"] = sorted(ours.union(prints))

    def _remove_obsolete(self, variant: VariantPlan, ours: set[str]) -> None:
        folder = self.file.out / variant.folder
        manifest = read_manifest(folder)
        entry = manifest.variants.get(variant.recipe.spec) if manifest is not None else None
        if manifest is None or entry is None or entry.fingerprint not in ours:
            return
        self.watch.on_note(f"{variant.recipe.spec}: made again, of other inputs; the old files are removed")
        for file in entry.files:
            (folder / file.path).unlink(missing_ok=True)
        # the files first: an entry without its files is found again by the next run, files without an entry are not
        manifest = manifest.without(variant.recipe.spec)
        if manifest.variants:
            manifest.write(folder)
            return
        if variant.recipe.container.is_checkpoint:
            self._remove_side_files(folder)
        (folder / MANIFEST).unlink()

    def _remove_side_files(self, folder: Path) -> None:
        """Those that convert and card put there; anything else stays, and convert refuses the folder."""
        from streamquant.publish.cards.origin import BASE_CARD

        for name in (*self.plan.checkpoint.side_files, CONFIG, INDEX, CARD, BASE_CARD):
            (folder / name).unlink(missing_ok=True)
        if (folder / REPORT_FOLDER / "report.json").is_file():
            shutil.rmtree(folder / REPORT_FOLDER)
        for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            if not any(inner.iterdir()):
                inner.rmdir()

    def would(self) -> str:
        """What would be made, and what is there."""
        complete = self._complete()
        rest = [variant for variant in self.plan.variants if variant not in complete]
        there = f"; there already: {', '.join(v.recipe.spec for v in complete)}" if complete else ""
        return f"make {self._sizes(rest)}{there}" if rest else "nothing: all variants are there"

    def run(self) -> tuple[str, list[Path]]:
        """Convert; an unfinished run goes on."""
        self._remember()
        total = done = 0

        def start(plan: Plan) -> None:
            nonlocal total
            total = sum(matrix.source.stop - matrix.source.start for matrix in plan.matrices)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.watch.on_step("converting: MB", done // 10**6, total // 10**6)

        on_wait = lambda what, seconds: self.watch.on_note(f"{what}; again in {seconds:.0f} s")  # noqa: E731
        made = convert(
            self.road.checkpoint,
            self.file.recipes,
            self.file.out,
            self.plan.options,
            jobs=self.file.jobs or default_jobs(),
            device=choose_device(self.file.device),
            fetching=Fetching(self.file.spool_gib, on_wait=on_wait),
            on_start=start,
            on_progress=advance,
        )
        text = self._sizes([v for v in self.plan.variants if v.recipe.spec not in made.already_done])
        resumed = f"; {made.resumed_chunks} of {len(self.plan.chunks)} chunks were there" if made.resumed_chunks else ""
        there = f"; there already: {', '.join(made.already_done)}" if made.already_done else ""
        return f"{text or 'nothing to do'}{resumed}{there}", []


def imatrix_for_planning(road: Road) -> ImportanceMatrix | None:
    """The importance matrix, or before it is there one of the same names and lengths: sizes come out the same."""
    stage, path = road.file.imatrix, road.imatrix_path
    if stage is None or path is None:
        return None
    work = ImatrixWork(road)
    if stage.file is not None or (work.entry.done == work.key and road.state.is_intact("imatrix")):
        return road.imatrix()
    return expected_imatrix(road.checkpoint, path.name, stage)


def expected_imatrix(checkpoint: Checkpoint, name: str, stage: ImatrixStage) -> ImportanceMatrix:
    """What an importance matrix over the texts will be, but for its values: an entry for each linear layer."""
    entries = {
        rule.gguf_name: np.broadcast_to(np.float32(1), (checkpoint.tensors[hf].row_length,))
        for hf, rule in describe(checkpoint.config).rules.items()
        if hf in checkpoint.tensors
        and rule.kind is TensorKind.LINEAR
        and rule.gguf_name.startswith("blk.")
        and rule.gguf_name.endswith(".weight")
    }
    found = ImportanceMatrix(name, "not computed yet", tuple(path.name for path in stage.text), 1, entries)
    return found.select(stage.include_weights, stage.exclude_weights)
