"""The one place that writes files: no write goes through a link, and what the operating system says when one fails.

    create(path)           a new file; a link of that name is removed, and what it leads to is left alone
    open_own(path)         a file that an earlier run may have begun, if it is a plain file with one name
    replacing(path)        a file that gets its name when it is complete
    make_folder(path, of)  a folder that lies where its name says, below another

A plain file is a regular file with one name. Through a symbolic link, or a second (hard) link, a write would change a
file outside the output folder: a shard of the source, for instance. tests/test_writing.py lists what writes
otherwise.
"""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from streamquant.files.folders import real_path
from streamquant.quant.errors import StreamquantError, UsageError

PARTIAL = ".partial"
"""The end of a file's name while it is being filled."""
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


def partial_of(final: Path) -> Path:
    """The name of a file while it is being filled."""
    return final.with_name(final.name + PARTIAL)


def create(path: Path) -> int:
    """A descriptor of a new, empty file, for reading and writing.

    Whatever had the name loses it: a link is removed and not followed, a file with other names keeps its bytes under
    those. Raises OSError.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def open_own(path: Path, *, make: bool = True, append: bool = False) -> int:
    """A descriptor, for reading and writing, of a file that an earlier run may have left.

    Raises StreamquantError if it is no plain file; OSError: FileNotFoundError if it is not there and `make` is false.
    """
    if make:
        with contextlib.suppress(FileNotFoundError):
            _check_plain(path, path.lstat())  # before it is opened: a FIFO would wait, a device might act
    else:
        _check_plain(path, path.lstat())
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0) | (os.O_APPEND if append else 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        _check_plain(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def reopen(path: Path) -> int:
    """A plain file as `open_own` opens it; in place of anything else, or of nothing, a new one. Raises OSError."""
    try:
        return open_own(path)
    except StreamquantError:
        return create(path)


def is_same_file(path: Path, descriptor: int, size: int) -> bool:
    """Whether a name is that of an open file, which is plain and has this size. Raises OSError."""
    found = os.fstat(descriptor)
    return os.path.samestat(path.lstat(), found) and _is_plain(found) and found.st_size == size


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite until all of `data` is written. Raises OSError."""
    data = data.cast("B")
    at = 0
    while at < len(data):
        at += os.pwrite(descriptor, data[at:], offset + at)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A new file, open to be filled, which takes the place of `path` when the block ends without an error.

    Its bytes are on the disk before it gets the name. `shared`: other processes may write the same file at the same
    time, as in a cache. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}") if shared else partial_of(path)
    file = open(create(partial), "wb")  # noqa: SIM115 # the block below closes it
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_atomically(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a small file so that it has either its old or its new contents, whatever happens; `shared` as `replacing`.

    Raises OSError.
    """
    with replacing(path, shared=shared) as file:
        file.write(data)


def give_name(partial: Path, final: Path) -> None:
    """Give a synced file its final name, and make the name itself survive a power loss. Raises OSError."""
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_folder(folder: Path, root: Path) -> None:
    """Raise UsageError if a folder below `root`, there or not, would lie elsewhere, through a link on the way to it."""
    parts = folder.relative_to(root).parts
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        if place.is_symlink():
            raise UsageError(
                "a folder in the output folder is a link",
                where=str(place),
                found=f"it leads to {real_path(place)}",
                required=f"a folder inside {root}: nothing is written anywhere else",
                hint="remove the link, or choose another output folder",
            )


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder below `root`, with those above it. Raises UsageError as `check_folder`, OSError."""
    check_folder(folder, root)
    folder.mkdir(parents=True, exist_ok=True)


def explain(error: OSError, out: Path) -> StreamquantError:
    """An error of the operating system as a message for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StreamquantError(
            "the disk is full",
            where=str(out),
            found=error.strerror,
            hint="free some space and run the same command again: it continues where it stopped",
        )
    return StreamquantError(
        "cannot read or write a file",
        where=str(error.filename or out),
        found=error.strerror or str(error),
        hint="check the disk and the permissions of the folder; then run the same command again",
    )


@contextmanager
def os_errors_told() -> Iterator[None]:
    """Raises StreamquantError for an OSError inside: a name too long, a loop of links, no permission, a folder that is
    gone. Also a decorator. A closed pipe stays what it is, and ends the command without a word.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise explain(error, Path(error.filename or os.curdir)) from error


def check_writable(folder: Path, names: Iterable[str] = (), *, try_it: bool = False) -> None:
    """Raise StreamquantError if a folder, there or not, cannot be made, or takes no files of these names.

    Nothing is made. `try_it`: a file without a name is opened, for what permissions do not tell (root in /proc).
    """
    try:
        there = next(above for above in (folder, *folder.absolute().parents) if os.path.lexists(above))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            code = _why_not(there)
            raise OSError(code, os.strerror(code), str(folder))
        longest = os.pathconf(there, "PC_NAME_MAX")
        for name in (*folder.absolute().relative_to(there.absolute()).parts, *names):
            if len(os.fsencode(name)) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        if try_it:
            _try(there, folder)
    except OSError as error:
        raise explain(error, folder) from error


def _try(there: Path, folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # which names a file of a random name
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _why_not(folder: Path) -> int:
    """What the system answers to a new file in a folder that takes none."""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return errno.EROFS
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))  # without a name: nothing is made
    except OSError as error:
        return error.errno if error.errno in (errno.EPERM, errno.EACCES, errno.EROFS) else errno.EACCES
    return errno.EACCES


def _is_plain(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not _is_plain(found):
        names = f"a file with {found.st_nlink} names (hard links)"
        kind = next((text for is_kind, text in _KINDS if is_kind(found.st_mode)), names)
        raise StreamquantError(
            "a file that is to be written is a link, or no regular file",
            where=str(path),
            found=kind,
            required="a regular file with one name: nothing is written anywhere else",
            hint="remove it, or choose another output folder",
        )
