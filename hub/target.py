"""A repository of the Hub that files are sent to: what it holds, and files into it in commits.

    Target.open()            the repository and the branch exist
    Target.holds()           path -> size and hashes of what is there
    Target.send(files, ...)  one commit, unless all of it is there; safe to repeat after whatever went wrong

Uploads are huggingface_hub's own: `preupload_lfs_files`, then `create_commit`, by xet where the Hub offers it. What is
there is known by hash, so a repeated call sends nothing twice: neither the bytes of an object that arrived, nor a
commit whose answer was lost. The SHA-256 of a large file comes from the manifest: the client does not hash it again.
"""

import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_raise_for_status,
    set_client_factory,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from streamquant.files.hashing import sha256_of
from streamquant.files.worker import Worker
from streamquant.hub.errors import ask, scrub
from streamquant.hub.http_library import httpx
from streamquant.hub.repo import MAIN, OnBytes, OnWait, Stopped, git_blob, parse_spec, quiet_client
from streamquant.quant.errors import StreamquantError, UsageError

T = TypeVar("T")

THREADS = 4
"""Files of a commit that are uploaded at once, where xet does not do it by itself."""
CONFLICT = frozenset({409, 412})
"""Statuses of a commit that came at the same time as another one: it is made again on top of that."""
TIMEOUT = httpx.Timeout(300.0, connect=30.0)
"""Seconds without a byte until a connection is given up; the client's own default is never."""

STOP_SECONDS = 3.0
"""How long a stop waits for uploads to end."""


@dataclass(frozen=True, slots=True)
class Held:
    """A file as the Hub lists it."""

    size: int
    sha256: str | None
    """None for a file that is in git itself."""
    git_sha1: str
    """Git's hash of the file, or of its pointer if there is a sha256."""

    def is_same(self, file: "Outgoing") -> bool:
        """Whether it has the bytes of a file. Reads it unless its size differs or its sha256 is known."""
        if self.size != file.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == file.hash_of_content()
        return file.file is not None and self.git_sha1 == git_sha1(file.file)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to send."""

    path: str
    """In the repository, with slashes."""
    file: Path | None
    """None: it is on the disk no more, and should be there already."""
    size: int
    sha256: str | None
    """None: not known yet."""

    def hash_of_content(self) -> str:
        """The SHA-256, read from the file if it is not known."""
        if self.sha256 is not None:
            return self.sha256
        assert self.file is not None, "a file without a known hash is there"
        return sha256_of(self.file)


def git_sha1(path: Path) -> str:
    """The hash of git of a small file, in hexadecimal."""
    data = path.read_bytes()
    digest = git_blob(len(data))
    digest.update(data)
    return digest.hexdigest()


def connect(*, to_write: bool = True) -> HfApi:
    """The Hub's client, quiet and with time-outs.

    Raises StreamquantError in offline mode and, `to_write`, without a token.
    """
    where = constants.ENDPOINT
    if constants.is_offline_mode():
        raise StreamquantError(
            "the Hub is switched off", where=where, found="HF_HUB_OFFLINE=1", hint="unset HF_HUB_OFFLINE to upload"
        )
    if to_write and get_token() is None and "HF_OIDC_RESOURCE" not in os.environ:
        raise StreamquantError(
            "no token for the Hub",
            where=where,
            required="a token with write access",
            hint="run `hf auth login`, or set HF_TOKEN",
        )
    _set_up_client()
    return HfApi(library_name="streamquant")


@functools.cache
def _set_up_client() -> None:
    """Once in a process: a new factory closes the connections of all threads."""
    quiet_client()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    set_client_factory(_client_with_timeouts)


def _client_with_timeouts() -> httpx.Client:
    client = default_client_factory()
    client.timeout = TIMEOUT
    return client


def check_name(repo: str) -> str:
    """ORG/NAME. Raises UsageError for what cannot be a repository."""
    found = parse_spec(repo)
    if found is None or "@" in repo:
        raise UsageError("not the name of a repository", where=repo, required="ORG/NAME", hint="a branch: --revision")
    return found[0]


class Target:
    """One repository, at a branch or in a pull request. Safe to use from several threads.

    `on_bytes` gets the bytes just sent, or found there; `stop` ends uploads and waits soon after it is set.
    """

    def __init__(
        self,
        api: HfApi,
        repo: str,
        *,
        revision: str | None = None,
        pull_title: str | None = None,
        on_bytes: OnBytes = lambda _count: None,
        on_wait: OnWait = lambda _message, _seconds: None,
        stop: threading.Event | None = None,
    ) -> None:
        self.api, self.repo, self.branch = api, check_name(repo), revision or MAIN
        self.pull_title = pull_title
        self.stop = stop or threading.Event()
        self._on_bytes, self._on_wait = on_bytes, on_wait
        self._commits = threading.Lock()
        self._meters: dict[str, _Meter] = {}
        self._pull: int | None = None

    def __str__(self) -> str:
        return self.repo if self.branch == MAIN else f"{self.repo}@{self.branch}"

    @property
    def url(self) -> str:
        """The page of the repository, of the branch, or of the pull request."""
        page = f"{self.api.endpoint}/{self.repo}"
        if self._pull is not None:
            return f"{page}/discussions/{self._pull}"
        return page if self.branch == MAIN else f"{page}/tree/{self.branch}"

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        return ask(call, repo=str(self), what=what, on_wait=self._on_wait, stop=self.stop)

    # The repository

    def exists(self) -> bool:
        """Whether the repository is there; it is followed if it was renamed. Raises StreamquantError."""
        return self._find() is not None

    def _find(self) -> bool | None:
        """Whether it is private; None if it is not there."""

        def find() -> bool | None:
            try:
                info = self.api.repo_info(self.repo)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 404:
                    return None
                raise
            self.repo = info.id or self.repo
            return bool(info.private)

        return self._ask("looking for the repository", find)

    def open(self, *, private: bool) -> bool:
        """Make the repository and the branch if they are not there; returns whether the repository was made.

        Raises StreamquantError if it may not be made, or is public and `private` was asked for.
        """
        found = self._find()
        made = found is None
        if made:
            self._ask("making the repository", lambda: self._create(private=private))
            found = self._find()
        if found is None:
            raise StreamquantError(
                "the name is taken", where=self.repo, found="not by a model repository", hint="choose another --repo"
            )
        if private and not found:
            raise StreamquantError(
                "the repository is public",
                where=self.repo,
                required="a private one: --private was asked for",
                hint="make it private in its settings, choose another --repo, or leave --private out",
            )
        if self.branch != MAIN and not self.branch.startswith("refs/"):
            self._ask("making the branch", lambda: self.api.create_branch(self.repo, branch=self.branch, exist_ok=True))
        if self.pull_title is not None:
            self._ask("looking for the pull request", self._find_pull)
        self._choose_protocol()
        return made

    def _create(self, *, private: bool) -> None:
        with contextlib.suppress(KeyError):  # 409 without the address of what is there: another kind of thing
            self.api.create_repo(self.repo, private=private or None, exist_ok=True)

    def _find_pull(self) -> None:
        """The pull request of an earlier, interrupted push: open, by the same user, of the same title."""
        user = self.api.whoami()["name"]
        for discussion in self.api.get_repo_discussions(self.repo, discussion_type="pull_request", author=user):
            if discussion.status in ("open", "draft") and discussion.title == self.pull_title:
                self._pull = discussion.num
                return

    def _choose_protocol(self) -> None:
        """Upload by xet only where the Hub offers it: the client would try it everywhere, and fail."""
        if constants.HF_HUB_DISABLE_XET:
            return
        url = f"{self.api.endpoint}/api/models/{self.repo}/xet-write-token/{MAIN}"
        response = self._ask("choosing the protocol", lambda: get_session().get(url, headers=build_hf_headers()))
        if response.status_code in (404, 405, 501):
            constants.HF_HUB_DISABLE_XET = True

    def check_card(self, text: str) -> None:
        """Let the Hub look at a model card, as it does at every commit. Raises StreamquantError if it refuses it."""

        def look() -> list[str]:
            body = {"content": text, "repoType": "model"}
            response = get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=body)
            if response.status_code == 400:
                return [str(error.get("message")) for error in response.json().get("errors", [])]
            hf_raise_for_status(response)
            return []

        if wrong := self._ask("checking the model card", look):
            raise StreamquantError(
                "the Hub does not accept the model card",
                where=f"{self.repo}, README.md",
                found=scrub("; ".join(wrong)),
                hint="mend the YAML at its head; nothing was sent",
            )

    # What is there

    @property
    def _head(self) -> str:
        return f"refs/pr/{self._pull}" if self._pull is not None else self.branch

    def holds(self) -> dict[str, Held]:
        """Path -> file, of all files at the head of the branch or pull request. Raises StreamquantError."""

        def listing() -> dict[str, Held]:
            try:
                return _held(self.api.list_repo_tree(self.repo, recursive=True, revision=self._head))
            except RevisionNotFoundError:  # a dry run asks for a branch that would be made
                return {}

        return self._ask("listing what is there", listing)

    def look_up(self, paths: Sequence[str]) -> dict[str, Held]:
        """The same of some files alone."""
        return self._ask(
            "checking what arrived", lambda: _held(self.api.get_paths_info(self.repo, list(paths), revision=self._head))
        )

    # Sending

    def send(self, files: Sequence[Outgoing], message: str) -> str:
        """Upload files and make one commit of them; returns the commit, or the head if nothing was new.

        Raises StreamquantError; Stopped soon after `stop` is set. Whatever arrived counts for the next call.
        """
        for file in files:
            self._meters.setdefault(file.path, _Meter(file.size, self._on_bytes, self.stop))
        what = "uploading " + (files[0].path if len(files) == 1 else f"{len(files)} files")
        try:
            oid = ask(
                lambda: self._send(files, message),
                repo=str(self),
                what=what,
                on_wait=self._on_wait,
                stop=self.stop,
                also=CONFLICT,
            )
        except StreamquantError:
            if self.stop.is_set():
                raise Stopped from None
            raise
        for file in files:
            self._meters.pop(file.path).complete()
        return oid

    def _send(self, files: Sequence[Outgoing], message: str) -> str:
        """One attempt. Everything is looked up anew: an earlier one may have got further than its answer told."""
        if self.pull_title is not None and self._pull is None:
            self._find_pull()
        makes_pull = self.pull_title is not None and self._pull is None
        additions = [_Addition.of(file, self._meters[file.path]) for file in files]
        self.api.preupload_lfs_files(
            self.repo, additions, revision=self._head, create_pr=makes_pull, num_threads=THREADS, free_memory=False
        )
        if self.stop.is_set():
            raise Stopped
        with self._commits:
            made = self.api.create_commit(
                self.repo,
                additions,
                commit_message=(makes_pull and self.pull_title) or message,
                revision=self._head,
                create_pr=makes_pull,
            )
        if makes_pull:
            self._pull = made.pr_num
        return str(made.oid)


def _held(entries: Iterable[object]) -> dict[str, Held]:
    return {
        entry.path: Held(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


class _Meter:
    """Counts the bytes of a file that were sent, each once, however often an upload begins again."""

    def __init__(self, size: int, on_bytes: OnBytes, stop: threading.Event) -> None:
        self._size, self._on_bytes, self._stop = size, on_bytes, stop
        self._counted = 0

    def reached(self, position: int) -> None:
        """The bytes before `position` are on their way. Raises Stopped."""
        if self._stop.is_set():
            raise Stopped
        if position > self._counted:
            self._on_bytes(position - self._counted)
            self._counted = position

    def complete(self) -> None:
        """The file is there."""
        self._on_bytes(self._size - self._counted)
        self._counted = self._size


class _MeteredFile(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, meter: _Meter) -> None:
        super().__init__(io.FileIO(path))
        self._meter = meter

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._meter.reached(self.tell())
        return data


class _Addition(CommitOperationAdd):
    """The client's operation for a file whose hash is known, which tells how far its upload is."""

    _source: Path
    _meter: _Meter

    @classmethod
    def of(cls, file: Outgoing, meter: _Meter) -> "_Addition":
        """Raises StreamquantError if the file is not as it was."""
        if file.file is None or not file.file.is_file() or file.file.stat().st_size != file.size:
            raise StreamquantError(
                "a file changed while it was being published",
                where=str(file.file or file.path),
                required=f"{file.size:,} bytes",
                hint="verify the folder, then run the same command again",
            )
        addition = cls(file.path, file.file.absolute())
        if file.sha256 is not None:
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)
        addition._source, addition._meter = file.file, meter
        return addition

    @contextlib.contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """The file; a metered one where the client would show a bar."""
        if not with_tqdm:
            with self._source.open("rb") as file:
                yield file
        else:
            with _MeteredFile(self._source, self._meter) as file:
                yield file


def in_background(call: Callable[[], T], stop: threading.Event) -> T:
    """`call` in a thread of its own, so that an interrupt reaches the caller in the midst of an upload.

    KeyboardInterrupt sets `stop` and is raised when the upload has ended, at the latest STOP_SECONDS later: one that
    waits for an answer is left behind. Other errors are those of the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # handed to the calling thread, whatever it is
            errors.append(error)

    thread = Worker(work, "upload")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        stop.set()
        abort_xet()
        thread.join(STOP_SECONDS)
        raise
    if errors:
        raise errors[0]
    return results[0]


def abort_xet() -> None:
    """End the transfers of hf_xet, which do not look at an event."""
    with contextlib.suppress(Exception):  # its session is a private matter of the client's, and may not be there
        from huggingface_hub.utils import _xet

        _xet.abort_xet_session()  # type: ignore[no-untyped-call] # it has no types
