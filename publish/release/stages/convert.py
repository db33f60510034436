"""The stage convert: all variants from one read of the source."""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from streamquant.convert.conversion import convert
from streamquant.convert.manifest import MANIFEST, complete_variants, read_manifest
from streamquant.convert.plan.records import Plan, VariantPlan
from streamquant.convert.source.weights import CONFIG, INDEX
from streamquant.files.sizes import human_bytes
from streamquant.files.writing import explain
from streamquant.publish.release.stages.imatrix import imatrix_for_planning
from streamquant.publish.release.stages.stage import SkippableStage
from streamquant.publish.results import CARD, REPORT_FOLDER


class ConvertStage(SkippableStage):
    """All variants from one read. What is complete is known by the manifests, so that the key is the plan's own."""

    name = "convert"

    @cached_property
    def plan(self) -> Plan:
        """With the importance matrix that is there, or in a dry run will be."""
        return self.release.plan(imatrix_for_planning(self.release) if self.release.pending else self.release.imatrix())

    def inputs(self) -> object:
        """The plan's fingerprint covers the source, the importance matrix, options and addresses."""
        return self.plan.fingerprint

    def _complete(self) -> list[VariantPlan]:
        return complete_variants(self.file.out, self.plan)

    def skip_reason(self) -> str | None:
        """All variants, if all are complete; whoever made them."""
        if len(self._complete()) < len(self.plan.variants):
            return None
        self._remember()
        return self._sizes(self.plan.variants)

    def _sizes(self, variants: Sequence[VariantPlan]) -> str:
        return ", ".join(f"{v.recipe.spec} {human_bytes(self.plan.variant_bytes(v))}" for v in variants)

    def _remember(self) -> None:
        """Which folders the release has, and the fingerprints that are ours to replace."""
        made = self.state.made
        folders = tuple(sorted({variant.folder for variant in self.plan.variants}))
        if made.folders != folders and not self.release.options.dry_run:
            made.folders = folders
            self.release.state.write()

    def prepare(self) -> None:
        """Remove the variants that this release made of other inputs."""
        ours = set(self.state.made.ours)
        complete = {variant.recipe.spec for variant in self._complete()}
        try:
            for variant in self.plan.variants:
                if variant.recipe.spec not in complete:
                    self._remove_obsolete(variant, ours)
        except OSError as error:
            raise explain(error, self.file.out) from error
        prints = [self.plan.variant_fingerprint(v) for v in self.plan.variants if v.recipe.spec not in complete]
        self.state.made.ours = tuple(sorted(ours.union(prints)))

    def _remove_obsolete(self, variant: VariantPlan, ours: set[str]) -> None:
        folder = self.file.out / variant.folder
        manifest = read_manifest(folder)
        entry = manifest.variants.get(variant.recipe.spec) if manifest is not None else None
        if manifest is None or entry is None or entry.fingerprint not in ours:
            return
        self.listener.note(f"{variant.recipe.spec}: made again, of other inputs; the old files are removed")
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

    def describe(self) -> str:
        """What would be made, and what is there."""
        complete = self._complete()
        rest = [variant for variant in self.plan.variants if variant not in complete]
        there = f"; there already: {', '.join(v.recipe.spec for v in complete)}" if complete else ""
        return f"make {self._sizes(rest)}{there}" if rest else "nothing: all variants are there"

    def run(self) -> tuple[str, list[Path]]:
        """Convert; an unfinished run goes on."""
        self._remember()
        made = convert(self.plan, self.file.out, self.file.run_options, self.listener)
        text = self._sizes([v for v in self.plan.variants if v.recipe.spec not in made.already_done])
        resumed = f"; {made.resumed_chunks} of {len(self.plan.chunks)} chunks were there" if made.resumed_chunks else ""
        there = f"; there already: {', '.join(made.already_done)}" if made.already_done else ""
        return f"{text or 'nothing to do'}{resumed}{there}", []
