"""What becomes of a finished file: it stays, or is taken away while the rest is converted (see publish/upload)."""

from pathlib import Path
from typing import Protocol


class Delivery(Protocol):
    """Takes finished files from the disk while the rest is converted. `path` is that of the plan, below --out."""

    delete: bool
    """Whether a file that was delivered leaves the disk."""
    room: int
    """The most bytes that wait for their delivery before the conversion waits."""

    def has(self, path: str, size: int, sha256: str) -> bool:
        """Whether a file that is not on the disk any more is safely where it was to go."""

    def take(self, path: str, file: Path, size: int, sha256: str) -> None:
        """A file has its final name. Returns soon, but waits while too many bytes are on their way.

        Raises StreamquantError if an earlier file could not be delivered.
        """

    def wait_for_room(self) -> None:
        """Wait while too many bytes are on their way. Raises as `take`."""

    def finish(self) -> None:
        """Wait until everything is delivered. Raises StreamquantError if that failed."""

    def stop(self) -> None:
        """Stop soon; a later run takes up what is left."""
