"""What the stages share that work on the variants of a release."""

from functools import cached_property
from typing import Any

from streamquant.publish.release.stages.stage import SkippableStage
from streamquant.publish.results import PublishedVariant, VariantFolder
from streamquant.quant.errors import StreamquantError


class VariantsStage(SkippableStage):
    """A stage that works on the folders of variants."""

    @cached_property
    def folders(self) -> list[VariantFolder]:
        """Those of this release."""
        return self.release.folders()

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
