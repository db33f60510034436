"""The stage verify: what was written is read back."""

from pathlib import Path

from streamquant.convert.source.checkpoint import Checkpoint, open_checkpoint
from streamquant.convert.source.hub_checkpoint import HubCheckpoint
from streamquant.publish.release.stages.variants import VariantsStage
from streamquant.quant.errors import StreamquantError


class VerifyStage(VariantsStage):
    """Read back what was written."""

    name = "verify"

    @property
    def with_source(self) -> bool:
        """Whether every byte is compared with the source."""
        return self.file.verify is not None and self.file.verify.source

    def inputs(self) -> object:
        """The bytes."""
        return [self.bytes_of_variants(), self.with_source]

    def skip_reason(self) -> str | None:
        """It leaves nothing behind but the key."""
        return "these bytes were verified before" if self.state.done == self.key else None

    def describe(self) -> str:
        """What would be compared."""
        return "compare every byte with the source" if self.with_source else "compare hashes with the manifests"

    def run(self) -> tuple[str, list[Path]]:
        """Verify each folder. Raises StreamquantError if anything differs."""
        from streamquant.validate.readback.verify import VERIFYING, bytes_to_verify, verify

        imatrix = self.release.imatrix() if self.with_source else None
        total = sum(bytes_to_verify(folder.path, with_source=self.with_source) for folder in self.folders)
        self.listener.started(VERIFYING, total, "bytes")
        source = self._local_source() if self.with_source else None
        calibration = self.file.options.calibration
        found = [
            result
            for folder in self.folders
            for result in verify(folder.path, source, imatrix, self.listener, calibration)
        ]
        if wrong := [f"{result.spec}: {problem}" for result in found for problem in result.problems]:
            raise StreamquantError(
                "what was written is not what it should be",
                where=str(self.file.out),
                found="; ".join(wrong[:5]),
                hint="check the disk, remove the variant, and run again",
            )
        return f"{len(found)} variants, {sum(result.files for result in found)} files", []

    def _local_source(self) -> Checkpoint:
        source = self.release.checkpoint
        return open_checkpoint(self.release.weights) if isinstance(source, HubCheckpoint) else source
