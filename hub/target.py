"""A repository of the Hub that files are sent to: what it holds, and files into it in commits.

    Target.open()            the repository and the branch exist
    Target.holds()           path -> size and hashes of what is there
    Target.upload(file)      the content of a file, which no commit names yet
    Target.send(files, ...)  one commit, unless all of it is there; safe to repeat after whatever went wrong

Uploads are huggingface_hub's own: `preupload_lfs_files`, then `create_commit`, by xet where the Hub offers it. What is
there is known by hash, so a repeated call sends nothing twice: neither the bytes of an object that arrived, nor a
commit whose answer was lost. The SHA-256 of a large file comes from the manifest: the client does not hash it again.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_session, hf_raise_for_status
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers

from streamquant.files.listener import SILENT, Listener
from streamquant.files.worker import Stopped
from streamquant.hub.errors import Retrying, ask, scrub, status_of
from streamquant.hub.outgoing import Addition, Held, Meter, Outgoing
from streamquant.hub.reference import MAIN, check_name
from streamquant.quant.errors import StreamquantError

T = TypeVar("T")

THREADS = 4
"""Files of a commit that are uploaded at once, where xet does not do it by itself."""
CONFLICT = frozenset({409, 412})
"""Statuses of a commit that came at the same time as another one: it is made again on top of that."""
NOT_MADE = CONFLICT | {429}
"""Statuses of a commit that certainly was not made: what was uploaded for it needs no second look."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where files go."""

    repo: str
    """ORG/NAME."""
    revision: str | None = None
    """A branch; None: main."""
    pull_title: str | None = None
    """The title of a pull request that is made in place of commits to the branch."""


class Target:
    """One repository, at a branch or in a pull request. Safe to use from several threads.

    `listener` hears of the bytes just sent, or found there; `stop` ends uploads and waits soon after it is set.
    """

    def __init__(
        self, api: HfApi, to: Destination, listener: Listener = SILENT, stop: threading.Event | None = None
    ) -> None:
        self.api, self.repo, self.branch = api, check_name(to.repo), to.revision or MAIN
        self.pull_title = to.pull_title
        self.stop = stop or threading.Event()
        self._listener = listener
        self._commits = threading.Lock()
        self._meters: dict[str, Meter] = {}
        self._uploaded: dict[str, Addition] = {}
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
        return ask(call, repo=str(self), what=what, how=Retrying(self._listener, self.stop))

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
                hint="correct the YAML at its top; nothing was sent",
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
        return ask(
            lambda: _held(self.api.get_paths_info(self.repo, list(paths), revision=self._head)),
            repo=str(self),
            what="checking what arrived",
            how=Retrying(self._listener, self.stop, patient=True),
        )

    # Sending

    def upload(self, file: Outgoing) -> None:
        """Upload the content of a file for a later `send`. Not for a pull request that is still to be made.

        Raises StreamquantError; Stopped soon after `stop` is set.
        """
        self._sending([file], lambda: self._upload(file))

    def send(self, files: Sequence[Outgoing], message: str) -> str:
        """Upload files and make one commit of them; returns the commit, or the head if nothing was new.

        Raises StreamquantError; Stopped soon after `stop` is set. Whatever arrived counts for the next call.
        """
        oid = self._sending(files, lambda: self._send(files, message))
        for file in files:
            self._meters.pop(file.path).complete()
        return oid

    def _sending(self, files: Sequence[Outgoing], call: Callable[[], T]) -> T:
        for file in files:
            self._meters.setdefault(file.path, Meter(file.size, self._listener, self.stop))
        what = "uploading " + (files[0].path if len(files) == 1 else f"{len(files)} files")
        how = Retrying(self._listener, self.stop, CONFLICT, patient=True)
        try:
            return ask(call, repo=str(self), what=what, how=how)
        except StreamquantError:
            if self.stop.is_set():
                raise Stopped from None
            raise

    def _upload(self, file: Outgoing) -> None:
        addition = Addition.of(file, self._meters[file.path])
        self.api.preupload_lfs_files(self.repo, [addition], revision=self._head, free_memory=False)
        self._uploaded[file.path] = addition

    def _addition(self, file: Outgoing) -> Addition:
        """The operation of a file: that of its upload, or a new one."""
        if file.path in self._uploaded:
            return self._uploaded.pop(file.path)
        return Addition.of(file, self._meters[file.path])

    def _send(self, files: Sequence[Outgoing], message: str) -> str:
        """One attempt. Everything but what was just uploaded is looked up anew: an earlier attempt may have got further
        than its answer told."""
        if self.pull_title is not None and self._pull is None:
            self._find_pull()
        makes_pull = self.pull_title is not None and self._pull is None
        additions = [self._addition(file) for file in files]
        self.api.preupload_lfs_files(
            self.repo, additions, revision=self._head, create_pr=makes_pull, num_threads=THREADS, free_memory=False
        )
        if self.stop.is_set():
            raise Stopped
        try:
            with self._commits:
                made = self.api.create_commit(
                    self.repo,
                    additions,
                    commit_message=(makes_pull and self.pull_title) or message,
                    revision=self._head,
                    create_pr=makes_pull,
                )
        except Exception as error:
            if status_of(error) in NOT_MADE:
                self._uploaded |= {addition.path_in_repo: addition for addition in additions}
            raise
        if makes_pull:
            self._pull = made.pr_num
        return str(made.oid)


def _held(entries: Iterable[object]) -> dict[str, Held]:
    return {
        entry.path: Held(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }
