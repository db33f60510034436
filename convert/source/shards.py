"""Where the bytes of the shards are while a plan runs: in a folder, or on their way through a spool (hub/spool.py)."""

import contextlib
import os
from collections.abc import Sequence
from typing import Protocol

from streamquant.convert.source.checkpoint import Checkpoint
from streamquant.quant.errors import StreamquantError


class Shards(Protocol):
    """The shards of a checkpoint. All methods may be called from any thread."""

    def expect(self, names: Sequence[str]) -> None:
        """These will be opened, about in this order; others may be."""

    def open(self, name: str) -> int:
        """A descriptor of a shard, valid until `done`; waits until the shard is there.

        Raises StreamquantError if it cannot be had, and if `stop` was called.
        """

    def done(self, name: str) -> None:
        """Nobody reads this shard any more."""

    def sha256(self, name: str) -> str | None:
        """The hash of a whole shard if it is known; None where the caller has to compute it."""

    def check_unchanged(self) -> None:
        """Raise StreamquantError if a shard is not what it was when the headers were read."""

    def stop(self) -> None:
        """Wake up who waits, fetch no more."""

    def close(self) -> None:
        """Close all descriptors."""


class LocalShards:
    """The shards of a local folder, all open from the start."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises StreamquantError for a shard that cannot be read."""
        self._checkpoint = checkpoint
        self._descriptors: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for file in checkpoint.files:
                path = checkpoint.folder / file.name
                try:
                    self._descriptors[file.name] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise StreamquantError("cannot read a shard", where=str(path), found=error.strerror) from error
            stack.pop_all()

    def expect(self, names: Sequence[str]) -> None:
        """See Shards.expect."""

    def open(self, name: str) -> int:
        """See Shards.open."""
        return self._descriptors[name]

    def done(self, name: str) -> None:
        """See Shards.done: the descriptor stays, hashes are still to be made."""

    def sha256(self, name: str) -> str | None:
        """See Shards.sha256: nobody has said it."""

    def check_unchanged(self) -> None:
        """See Shards.check_unchanged."""
        self._checkpoint.check_unchanged()

    def stop(self) -> None:
        """See Shards.stop."""

    def close(self) -> None:
        """See Shards.close."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
