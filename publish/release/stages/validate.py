"""The stage validate: the report, and its gates."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.files.hashing import sha256_of
from streamquant.publish.release.release_file import ReleaseValidate
from streamquant.publish.release.stages.variants import VariantsStage
from streamquant.quant.errors import StreamquantError

if TYPE_CHECKING:
    from streamquant.validate.report.data import Report

ENGINES = ("xllamacpp", "jinja2")
"""Packages whose versions a validation depends on beside those of the forward pass."""


class ValidateStage(VariantsStage):
    """The report. Its gates are judged again without a new measurement when only they changed."""

    name = "validate"

    @property
    def options(self) -> ReleaseValidate:
        """Its options."""
        assert self.file.validate is not None, "the stage is asked for"
        return self.file.validate

    def inputs(self) -> object:
        """Source, bytes of the variants, texts, options, versions; not the gates."""
        options = self.options
        texts = [[path.name, sha256_of(path)] for path in options.text]
        how = [
            *(options.context, options.chunks, options.dtype, sorted(options.skip), sorted(options.noise)),
            *(options.weights_only, options.answer_tokens, self.file.device),
            *((options.engine,) if options.engine is not None else ()),  # so that earlier states keep their key
        ]
        versions = self.release.versions(*ENGINES)
        return [self.release.source, self.bytes_of_variants(), texts, how, versions]

    def skip_reason(self) -> str | None:
        """The report, if it is of these inputs and gates."""
        if super().skip_reason() is None or (report := self._report()) is None or report.gates != self.options.gates:
            return None
        return self._judged(report)

    def _report(self) -> "Report | None":
        """The report that is there, if this version can read it."""
        from streamquant.validate.report.data import read_report

        try:
            return read_report(self.options.report)
        except StreamquantError:
            return None

    def _judged(self, report: "Report") -> str:
        """What the gates say; those that failed are remembered."""
        from streamquant.validate.gates import failed

        self.release.failed_gates = tuple(str(gate) for gate in failed(report.gate_results))
        gates = f"{len(report.gate_results)} gates passed"
        if self.release.failed_gates:
            gates = f"{len(self.release.failed_gates)} of {len(report.gate_results)} gates FAILED"
        return f"{len(report.variants)} variants, {gates}; {self.options.report / 'report.html'}"

    def describe(self) -> str:
        """What would be measured."""
        texts = ", ".join(path.name for path in self.options.text)
        return f"measure {len(self.file.recipes)} variants on {texts}, report in {self.options.report}"

    def prepare(self) -> None:
        """Keep a report of the same measurement."""
        release = self.release
        known = not release.options.forced and self.state.done == self.key and release.state.is_intact(self.name)
        self._again = self._report() if known else None

    def run(self) -> tuple[str, list[Path]]:
        """Measure, or judge again; write the report."""
        from streamquant.validate.report.data import REPORT, check_report_folder, write_report
        from streamquant.validate.report.make import judge_again
        from streamquant.validate.report.render import write_pages

        check_report_folder(self.options.report)
        known, gates = self._again, self.options.gates
        report = self._measure() if known is None or known.gates == gates else judge_again(known, gates)
        self.listener.started("report", 1)
        write_report(report, self.options.report)
        write_pages(report, self.options.report)
        return self._judged(report), [self.options.report / REPORT]

    def _measure(self) -> "Report":
        from streamquant.validate.logits.hidden_states import default_cache, prune_cache
        from streamquant.validate.options import ValidationOptions
        from streamquant.validate.validation import validate

        asked = self.options
        cache = default_cache() if asked.cache else None
        options = ValidationOptions(
            texts=asked.text,
            setting=replace(self.release.setting(asked.dtype), weights_only=asked.weights_only),
            context=asked.context,
            chunks=asked.chunks,
            skip=frozenset(asked.skip),
            noise=asked.noise,  # type: ignore[arg-type] # those are its names
            gates=asked.gates,
            cache=cache,
            answer_tokens=asked.answer_tokens,
            engine=asked.engine,  # type: ignore[arg-type] # those are its names
            command=self.release.options.command,
        )
        paths = [
            folder.path if folder.container.is_checkpoint else folder.path / variant.files[0].path
            for folder, variant in self.variants()
        ]
        report = validate(self.release.weights, paths, options, self.listener)
        if cache is not None:
            prune_cache(cache)
        return report
