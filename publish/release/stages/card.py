"""The stage card: README.md and a copy of the report in every folder."""

from dataclasses import replace
from pathlib import Path

from streamquant.convert.manifest import MANIFEST
from streamquant.files.hashing import sha256_of
from streamquant.publish.cards.options import CardOptions
from streamquant.publish.release.stages.variants import VariantsStage
from streamquant.publish.results import CARD
from streamquant.validate.report.data import REPORT


class CardStage(VariantsStage):
    """README.md and a copy of the report in every folder."""

    name = "card"

    @property
    def options(self) -> CardOptions:
        """What the file says of cards."""
        assert self.file.card is not None, "the stage is asked for"
        return self.file.card

    def inputs(self) -> object:
        """Manifests, report, options."""
        manifests = [[folder.path.name, sha256_of(folder.path / MANIFEST)] for folder in self.folders]
        folder = self.release.report_folder
        report = None if folder is None else sha256_of(folder / REPORT)
        options = [self.options.quantized_by, self.options.base_model]
        return [manifests, report, options, self._repositories(), self.release.versions()["streamquant"]]

    def _repositories(self) -> dict[str, str]:
        """Name of folder -> repository, where it is known."""
        from streamquant.publish.upload.selection import repositories

        push = self.file.push
        return repositories(tuple(self.folders), push.repo, is_stem=True) if push is not None else {}

    def describe(self) -> str:
        """Where cards would be written."""
        if self.release.pending:
            return "write the model cards"
        return ", ".join(str(folder.path / CARD) for folder in self.folders)

    def run(self) -> tuple[str, list[Path]]:
        """Write them."""
        from streamquant.publish.cards.card import write_cards

        names = self._repositories()
        cards = []
        for folder in self.folders:
            options = replace(self.options, repo=names.get(folder.path.name), source=self.release.known_source)
            cards += write_cards(folder.path, options, self.release.report_folder)
        return ", ".join(map(str, cards)), cards
