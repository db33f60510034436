"""The stage imatrix: an importance matrix over texts, or the look at one that was given."""

from pathlib import Path

import numpy as np

from streamquant.convert.architectures import describe
from streamquant.convert.recipes.imatrix import ImportanceMatrix, read_imatrix
from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.files.hashing import sha256_of
from streamquant.publish.release.release_file import ReleaseImatrix
from streamquant.publish.release.release_run import ReleaseRun
from streamquant.publish.release.stages.stage import SkippableStage


class ImatrixStage(SkippableStage):
    """The importance matrix over texts; or the look at one that was given."""

    name = "imatrix"

    @property
    def options(self) -> ReleaseImatrix:
        """Its options."""
        assert self.file.imatrix is not None, "the stage is asked for"
        return self.file.imatrix

    @property
    def path(self) -> Path:
        """Where it is."""
        path = self.release.imatrix_path
        assert path is not None, "the stage is asked for"
        return path

    def inputs(self) -> object:
        """Source, texts, how they are cut, versions; or the file that was given."""
        options = self.options
        if options.file is not None:
            return [str(options.file), sha256_of(options.file)]
        texts = [[path.name, sha256_of(path)] for path in options.text]
        how = [options.context, options.chunks, options.dtype, self.file.device]
        return [self.release.source, self.path.name, texts, how, self.release.versions()]

    def prepare(self) -> None:
        """Clear the way for a new file: one of other inputs would be continued, or refused as another's."""
        state, path = self.state, self.path
        unfinished = state.begun == self.key and state.done is None  # of a run that was killed: it is continued
        if self.options.file is not None or state.begun is None or unfinished or not path.exists():
            return
        if state.done is None or self.release.state.is_intact(self.name):
            path.unlink()
        else:  # somebody changed it since
            path.replace(path.with_name(path.name + ".old"))
            self.listener.note(f"{path.name} is not as it was made: kept as {path.name}.old, and made again")

    def skip_reason(self) -> str | None:
        """The file, if it is that of these inputs."""
        return None if super().skip_reason() is None else str(self.path)

    def describe(self) -> str:
        """What would be computed."""
        if self.options.file is not None:
            return f"take {self.options.file}"
        chunks = f"{self.options.chunks} chunks of {self.options.context} tokens" if self.options.chunks else "all"
        return f"compute {self.path} over {', '.join(path.name for path in self.options.text)}: {chunks} of each"

    def run(self) -> tuple[str, list[Path]]:
        """Compute it; one that a killed run left is continued."""
        if self.options.file is not None:
            found = read_imatrix(self.options.file)
            return f"{len(found.entries)} entries over {found.chunk_count} chunks in {found.name}", [self.options.file]
        from streamquant.calibrate.importance import ImportanceOptions, write_importance
        from streamquant.model.corpus import read_corpus
        from streamquant.model.variants.open import open_original

        variant = open_original(self.release.weights)
        asked = self.options
        corpus = read_corpus(asked.text, variant.path, asked.context, asked.chunks, parse_special=asked.parse_special)
        done = write_importance(
            variant,
            corpus,
            self.path,
            ImportanceOptions(self.release.setting(asked.dtype), asked.save_every, asked.parse_special),
            self.listener,
        )
        resumed = f", {done.resumed_from} of them from before" if done.resumed_from else ""
        notes = "".join(f"; {note}" for note in done.notes)
        return f"{done.entries} tensors over {done.chunks} chunks{resumed} in {self.path}{notes}", [self.path]


def imatrix_for_planning(run: ReleaseRun) -> ImportanceMatrix | None:
    """The importance matrix, or before it is there one of the same names and lengths: sizes come out the same."""
    options, path = run.file.imatrix, run.imatrix_path
    if options is None or path is None:
        return None
    stage = ImatrixStage(run)
    if options.file is not None or (stage.state.done == stage.key and run.state.is_intact("imatrix")):
        return run.imatrix()
    return expected_imatrix(run.checkpoint, path.name, options)


def expected_imatrix(checkpoint: Checkpoint, name: str, options: ReleaseImatrix) -> ImportanceMatrix:
    """What an importance matrix over the texts will be, but for its values: an entry for each linear layer."""
    entries = {
        stored.gguf_name: np.broadcast_to(
            np.float32(1), (checkpoint.tensors[hf].row_length * (rule.expert.count if rule.expert else 1),)
        )
        for hf, rule in describe(checkpoint.config).rules.items()
        if hf in checkpoint.tensors
        for stored in rule.stored
        if stored.has_importance
    }
    found = ImportanceMatrix(name, "not computed yet", tuple(path.name for path in options.text), 1, entries)
    return found.select(options.include_weights, options.exclude_weights)
