"""How variants are published: the options of `push`, and of a conversion that uploads what it makes."""

from dataclasses import dataclass
from pathlib import Path

from streamquant.hub.reference import MAIN
from streamquant.publish.upload.limits import GB
from streamquant.quant.errors import UsageError

ROOM = 50 * GB
"""Bytes that may wait for their upload before the conversion waits for them."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """How to publish."""

    private: bool = False
    """The repositories are private; an existing public one is refused."""
    revision: str | None = None
    """A branch, which is made if it is not there; None: main."""
    create_pr: bool = False
    """Into a pull request in place of the branch."""
    without_report: bool = False
    """Also variants that were not measured or failed a gate; the card says so."""
    message: str | None = None
    """Title of the commits."""
    report: Path | None = None
    """Folder of the report; None: `report` beside the variant folders, or inside each."""
    source: Path | None = None
    """Folder of the original, for what only it can tell a card."""
    dry_run: bool = False
    """Ask the Hub what is there and change nothing, here or there."""

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, MAIN):
            raise UsageError(
                "a pull request is made against main", found=f"--revision {self.revision}", required="one of the two"
            )
        if self.message is not None and not self.message.strip():
            raise UsageError("an empty commit message", where="--commit-message")


@dataclass(frozen=True, slots=True)
class EarlyPush:
    """Where a conversion sends each file as soon as it is finished."""

    repo: str
    """ORG/NAME, the stem for several folders."""
    options: PushOptions
    """Of which `private`, `without_report` and `revision` count."""
    delete: bool = False
    """Delete each file of weights when the Hub holds it."""
    room: int = ROOM
    """With `delete`: bytes that may wait for their upload before the conversion waits for them."""

    def __post_init__(self) -> None:
        if not self.options.private and not self.options.without_report:
            raise UsageError(
                "a conversion cannot publish publicly: there is no report yet",
                required="--private with --push, or --without-report",
                hint="push privately, validate, and make the repository public afterwards",
            )


def early_push(repo: str | None, options: PushOptions, *, delete: bool) -> EarlyPush | None:
    """What the options of `convert` ask for; None without --push.

    Raises UsageError for options that need --push, and for one that would publish what nobody has measured yet.
    """
    if repo is not None:
        return EarlyPush(repo, options, delete)
    given = {
        "--private": options.private,
        "--without-report": options.without_report,
        "--push-revision": options.revision is not None,
        "--delete-after-upload": delete,
    }
    if found := [option for option, value in given.items() if value]:
        raise UsageError("an upload option without an upload", found=", ".join(found), required="--push ORG/NAME")
    return None
