"""The stage push: the folders to the Hub."""

from dataclasses import replace
from pathlib import Path

from streamquant.convert.manifest import MANIFEST
from streamquant.files.hashing import sha256_of
from streamquant.publish.release.release_file import ReleasePush
from streamquant.publish.release.release_run import gates_failed
from streamquant.publish.release.stages.variants import VariantsStage
from streamquant.publish.results import CARD


class PushStage(VariantsStage):
    """To the Hub; only variants that passed, unless the file says otherwise."""

    name = "push"

    @property
    def push(self) -> ReleasePush:
        """Where to, and how."""
        assert self.file.push is not None, "the stage is asked for"
        return self.file.push

    def inputs(self) -> object:
        """What is sent, and where to."""
        names = (MANIFEST, CARD) if self.file.card is not None else (MANIFEST,)  # push writes cards of its own else
        small = [
            [folder.path.name, name, sha256_of(folder.path / name)]
            for folder in self.folders
            for name in names
            if (folder.path / name).is_file()
        ]
        options = self.push.options
        return [small, self.push.repo, options.private, options.revision, options.create_pr]

    def skip_reason(self) -> str | None:
        """What was sent before is not looked for again: --from push does."""
        return "was published before" if self.state.done == self.key else None

    def describe(self) -> str:
        """Where it would go."""
        return f"publish to {self.push.repo}-...{' (private)' if self.push.options.private else ''}"

    def prepare(self) -> None:
        """Stop here if a gate failed."""
        if self.release.stopped_by_gates:
            raise gates_failed(self.release.failed_gates, "nothing was published")

    def run(self) -> tuple[str, list[Path]]:
        """Send what is not there yet."""
        from streamquant.publish.upload.push import push
        from streamquant.publish.upload.push_report import summary

        options = replace(self.push.options, report=self.release.report_folder)
        pushed = push(self.file.out, self.push.repo, options, self.listener)
        for note in dict.fromkeys(note for one in pushed for note in one.notes):
            self.listener.note(note)
        return "; ".join(summary(one) for one in pushed), []
