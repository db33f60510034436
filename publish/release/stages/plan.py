"""The stage plan: what would be made, and whether it can be."""

from collections.abc import Sequence

from streamquant.convert.conversion import check_disk, check_output_folder, disk_of
from streamquant.convert.manifest import complete_variants
from streamquant.convert.plan.disk import Disk
from streamquant.convert.plan.records import Plan
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.convert.source.snapshot import check_cache, client_cache, missing_bytes
from streamquant.files.folders import nearest_folder
from streamquant.files.sizes import human_bytes
from streamquant.publish.release.release_run import StageOutcome
from streamquant.publish.release.stages.imatrix import imatrix_for_planning
from streamquant.publish.release.stages.stage import Stage
from streamquant.quant.errors import StreamquantError


class PlanStage(Stage):
    """Open the source, plan, check folder and disk. It is never skipped: it is what finds out that nothing changed."""

    name = "plan"

    def perform(self) -> StageOutcome:
        """Plan, and check; nothing is written."""
        plan, out = self.release.plan(imatrix_for_planning(self.release)), self.file.out
        check_output_folder(plan, out)
        notes = list(plan.notes)
        if self.file.push is not None:
            notes += self._check_push(plan)
        if len(complete_variants(out, plan)) < len(plan.variants):
            self._check_texts()
            notes += self._check_disk(plan)
        for note in notes:
            self.listener.note(note)
        sizes = ", ".join(f"{v.recipe.spec} {human_bytes(plan.variant_bytes(v))}" for v in plan.variants)
        memory = human_bytes(plan.memory_bytes(self.file.run_options.jobs))
        room = self._room_for_source(plan)
        disk = human_bytes(plan.nbytes + room) + (f" ({human_bytes(room)} of it for the source)" if room else "")
        text = f"{sizes}; disk {disk}; memory about {memory}"
        return StageOutcome(self.name, "done", text)

    def _room_for_source(self, plan: Plan) -> int:
        """Bytes of a source of the Hub that lie on the disk: some shards, or all where a stage reads it as a whole."""
        spool, whole = disk_of(plan, self.file.run_options).spool, self._read_whole(plan)
        return max(spool, missing_bytes(whole)) if whole is not None else spool

    def _read_whole(self, plan: Plan) -> HubCheckpoint | None:
        """The source if it is on the Hub and a stage reads it as a whole."""
        file, source = self.file, plan.checkpoint
        matrix = file.imatrix is not None and file.imatrix.file is None
        verify = file.verify is not None and file.verify.source
        is_read = matrix or verify or file.validate is not None
        return source if isinstance(source, HubCheckpoint) and is_read else None

    def _check_disk(self, plan: Plan) -> Sequence[str]:
        """Raise StreamquantError if a disk is too small; in a dry run say so."""
        out, whole = self.file.out, self._read_whole(plan)
        try:
            if whole is not None and client_cache().stat().st_dev != nearest_folder(out).stat().st_dev:
                check_cache(whole)
                check_disk(plan, out, disk_of(plan, self.file.run_options))
            else:
                check_disk(plan, out, Disk(plan.nbytes + self._room_for_source(plan)))
        except StreamquantError as error:
            if not self.release.options.dry_run:
                raise
            return [" ".join(str(error).split())]
        return ()

    def _check_push(self, plan: Plan) -> Sequence[str]:
        """Hours before the push: is every file small enough, and is there a token? Returns remarks."""
        from streamquant.hub.client import connect
        from streamquant.publish.upload.limits import check_plan

        if (
            not self.release.options.dry_run
            and "push" in self.release.options.stages_of(self.file)
            and self.release.state["push"].done is None
        ):
            connect()
        return check_plan(plan)

    def _check_texts(self) -> None:
        """Hours before the validation: can every text be read, and is it long enough?"""
        from streamquant.model.corpus import read_corpus

        stage = self.file.validate
        if stage is not None:
            read_corpus(stage.text, self.release.checkpoint.folder, stage.context, stage.chunks)
