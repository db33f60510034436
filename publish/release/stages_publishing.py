"""The stages that look at what was made, and publish it: verification, validation, model cards, push."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamquant.convert.manifest import MANIFEST
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.convert.source.open import open_source
from streamquant.files.hashing import sha256_of
from streamquant.publish.release.release_file import ValidateStage
from streamquant.publish.release.release_run import Work, gates_failed
from streamquant.publish.release.steps import Steps
from streamquant.publish.results import CARD, PublishedVariant, VariantFolder
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    from streamquant.validate.report.data import Report

ENGINES = ("xllamacpp", "jinja2")
"""Packages whose versions a validation depends on beside those of the forward pass."""


class _OnVariants(Work):
    """A stage that works on the folders of variants."""

    @cached_property
    def folders(self) -> list[VariantFolder]:
        """Those of this release."""
        return self.road.folders()

    def variants(self) -> list[tuple[VariantFolder, PublishedVariant]]:
        """The variants of the file, in its order; others in the same folders are left alone."""
        found = {variant.spec: (folder, variant) for folder in self.folders for variant in folder.variants}
        if missing := [recipe.spec for recipe in self.file.recipes if recipe.spec not in found]:
            raise StreamquantError(
                "a variant is not converted yet",
                where=str(self.file.out),
                found=", ".join(missing),
                hint="leave --from and --only out",
            )
        return [found[recipe.spec] for recipe in self.file.recipes]

    def bytes_of_variants(self) -> list[Any]:
        """Every file with its hash, by the manifests."""
        return [
            [folder.path.name, variant.spec, [[file.path, file.size, file.sha256] for file in variant.files]]
            for folder, variant in self.variants()
        ]


class VerifyWork(_OnVariants):
    """Read back what was written."""

    name = "verify"

    @property
    def with_source(self) -> bool:
        """Whether every byte is compared with the source."""
        return self.file.verify is not None and self.file.verify.source

    def inputs(self) -> object:
        """The bytes."""
        return [self.bytes_of_variants(), self.with_source]

    def found(self) -> str | None:
        """It leaves nothing behind but the key."""
        return "these bytes were verified before" if self.entry.done == self.key else None

    def would(self) -> str:
        """What would be compared."""
        return "compare every byte with the source" if self.with_source else "compare hashes with the manifests"

    def run(self) -> tuple[str, list[Path]]:
        """Verify each folder. Raises StreamquantError if anything differs."""
        from streamquant.validate.readback.verify import bytes_to_verify, verify

        imatrix = self.road.imatrix() if self.with_source else None
        total = sum(bytes_to_verify(folder.path, with_source=self.with_source) for folder in self.folders)
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.watch.on_step("verifying: MB", done // 10**6, total // 10**6)

        source = self._local_source() if self.with_source else None
        found = [
            result for folder in self.folders for result in verify(folder.path, source, imatrix, on_progress=advance)
        ]
        if wrong := [f"{result.spec}: {problem}" for result in found for problem in result.problems]:
            raise StreamquantError(
                "what was written is not what it should be",
                where=str(self.file.out),
                found="; ".join(wrong[:5]),
                hint="is the disk sound? remove the variant and run again",
            )
        return f"{len(found)} variants, {sum(result.files for result in found)} files", []

    def _local_source(self) -> Checkpoint:
        return self.road.checkpoint if not self.road.checkpoint.remote else open_source(str(self.road.weights))


class ValidateWork(_OnVariants):
    """The report. Its gates are judged again without a new measurement when only they changed."""

    name = "validate"

    @property
    def stage(self) -> ValidateStage:
        """Its options."""
        assert self.file.validate is not None, "the stage is asked for"
        return self.file.validate

    def inputs(self) -> object:
        """Source, bytes of the variants, texts, options, versions; not the gates."""
        stage = self.stage
        texts = [[path.name, sha256_of(path)] for path in stage.text]
        options = [
            *(stage.context, stage.chunks, stage.dtype, sorted(stage.skip), sorted(stage.noise)),
            *(stage.weights_only, stage.answer_tokens, self.file.device),
        ]
        versions = self.road.versions(*ENGINES)
        return [self.road.source, self.bytes_of_variants(), texts, options, versions]

    def found(self) -> str | None:
        """The report, if it is of these inputs and gates."""
        if super().found() is None or (report := self._report()) is None or report.gates != self.stage.gates:
            return None
        return self._judged(report)

    def _report(self) -> "Report | None":
        """The report that is there, if this version can read it."""
        from streamquant.validate.report.data import read_report

        try:
            return read_report(self.stage.report)
        except StreamquantError:
            return None

    def _judged(self, report: "Report") -> str:
        """What the gates say; those that failed are remembered."""
        from streamquant.validate.gates import failed

        self.road.failed_gates = tuple(str(gate) for gate in failed(report.gate_results))
        gates = f"{len(report.gate_results)} gates passed"
        if self.road.failed_gates:
            gates = f"{len(self.road.failed_gates)} of {len(report.gate_results)} gates FAILED"
        return f"{len(report.variants)} variants, {gates}; {self.stage.report / 'report.html'}"

    def would(self) -> str:
        """What would be measured."""
        texts = ", ".join(path.name for path in self.stage.text)
        return f"measure {len(self.file.recipes)} variants on {texts}, report in {self.stage.report}"

    def before(self) -> None:
        """Keep a report of the same measurement."""
        known = not self.road.forced and self.entry.done == self.key and self.road.state.is_intact(self.name)
        self._again = self._report() if known else None

    def run(self) -> tuple[str, list[Path]]:
        """Measure, or judge again; write the report."""
        from streamquant.validate.report.data import REPORT, check_report_folder, write_report
        from streamquant.validate.report.make import judge_again
        from streamquant.validate.report.render import write_pages

        check_report_folder(self.stage.report)
        known = self._again
        report = (
            self._measure()
            if known is None or known.gates == self.stage.gates
            else judge_again(known, self.stage.gates)
        )
        self.watch.on_step("report", 0, 1)
        write_report(report, self.stage.report)
        write_pages(report, self.stage.report)
        return self._judged(report), [self.stage.report / REPORT]

    def _measure(self) -> "Report":
        from streamquant.validate.logits.hidden_states import default_cache, prune_cache
        from streamquant.validate.options import ValidationOptions
        from streamquant.validate.validation import validate

        stage = self.stage
        cache = default_cache() if stage.cache else None
        options = ValidationOptions(
            texts=stage.text,
            setting=replace(self.road.setting(stage.dtype), weights_only=stage.weights_only),
            context=stage.context,
            chunks=stage.chunks,
            skip=frozenset(stage.skip),
            noise=stage.noise,  # type: ignore[arg-type] # those are its names
            gates=stage.gates,
            cache=cache,
            answer_tokens=stage.answer_tokens,
            command=self.road.command,
        )
        paths = [
            folder.path if folder.container.is_checkpoint else folder.path / variant.files[0].path
            for folder, variant in self.variants()
        ]
        report = validate(self.road.weights, paths, options, Steps(self.watch.on_step))
        if cache is not None:
            prune_cache(cache)
        return report


class CardWork(_OnVariants):
    """README.md and a copy of the report in every folder."""

    name = "card"

    def inputs(self) -> object:
        """Manifests, report, options."""
        manifests = [[folder.path.name, sha256_of(folder.path / MANIFEST)] for folder in self.folders]
        report = sha256_of(self.road.report_folder / "report.json") if self.road.report_folder is not None else None
        options = [self.file.card.quantized_by, self.file.card.base_model] if self.file.card is not None else []
        return [manifests, report, options, self._repositories(), self.road.versions()["streamquant"]]

    def _repositories(self) -> dict[str, str]:
        """Name of folder -> repository, where it is known."""
        from streamquant.publish.upload.selection import repositories

        push = self.file.push
        return repositories(tuple(self.folders), push.repo, is_stem=True) if push is not None else {}

    def would(self) -> str:
        """Where cards would be written."""
        if self.road.pending:
            return "write the model cards"
        return ", ".join(str(folder.path / CARD) for folder in self.folders)

    def run(self) -> tuple[str, list[Path]]:
        """Write them."""
        from streamquant.publish.cards.card import CardOptions, write_cards

        assert self.file.card is not None, "the stage is asked for"
        names = self._repositories()
        cards = []
        for folder in self.folders:
            options = CardOptions(
                base_model=self.file.card.base_model,
                repo=names.get(folder.path.name),
                quantized_by=self.file.card.quantized_by,
                source=self.road.known_source,
            )
            cards += write_cards(folder.path, options, self.road.report_folder)
        return ", ".join(map(str, cards)), cards


class PushWork(_OnVariants):
    """To the Hub; only variants that passed, unless the file says otherwise."""

    name = "push"

    def inputs(self) -> object:
        """What is sent, and where to."""
        names = (MANIFEST, CARD) if self.file.card is not None else (MANIFEST,)  # push writes cards of its own else
        small = [
            [folder.path.name, name, sha256_of(folder.path / name)]
            for folder in self.folders
            for name in names
            if (folder.path / name).is_file()
        ]
        push = self.file.push
        assert push is not None, "the stage is asked for"
        return [small, push.repo, push.private, push.revision, push.create_pr]

    def found(self) -> str | None:
        """What was sent before is not looked for again: --from push does."""
        return "was published before" if self.entry.done == self.key else None

    def would(self) -> str:
        """Where it would go."""
        push = self.file.push
        assert push is not None, "the stage is asked for"
        return f"publish to {push.repo}-...{' (private)' if push.private else ''}"

    def before(self) -> None:
        """Stop here if a gate failed."""
        if self.road.stopped_by_gates:
            raise gates_failed(self.road.failed_gates, "nothing was published")

    def run(self) -> tuple[str, list[Path]]:
        """Send what is not there yet."""
        from streamquant.publish.upload.push import Wish, push
        from streamquant.publish.upload.push_report import summary

        stage = self.file.push
        assert stage is not None, "the stage is asked for"
        total = done = 0

        def start(nbytes: int) -> None:
            nonlocal total
            total = nbytes

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.watch.on_step("sending: MB", done // 10**6, max(total, done) // 10**6)

        pushed = push(
            self.file.out,
            stage.repo,
            Wish(
                private=stage.private,
                revision=stage.revision,
                create_pr=stage.create_pr,
                without_report=stage.without_report,
            ),
            report=self.road.report_folder,
            on_start=start,
            on_bytes=advance,
            on_wait=lambda what, seconds: self.watch.on_note(f"{what}; again in {seconds:.0f} s"),
        )
        for note in dict.fromkeys(note for one in pushed for note in one.notes):
            self.watch.on_note(note)
        return "; ".join(summary(one) for one in pushed), []
