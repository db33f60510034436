"""State of the Hub: repos, their commits and references, LFS objects, pull requests, tokens.

A commit holds its whole tree, path -> Entry. Commit oids are SHA-1 of parent, tree and title: the same history gives
the same oids in every run.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tests.hub.blobs import Blob, Content, FileBlob, as_blob

Gated = Literal["auto", "manual", False]
Role = Literal["read", "write"]

REGULAR_LIMIT = 10_000_000  # bytes; larger files are LFS whatever their name
COMMIT_OID = re.compile(r"[0-9a-f]{40}")
# The suffixes in the .gitattributes that the Hub puts into a new repo, and GGUF, which is found out by its content.
LFS_SUFFIXES = (
    "7z arrow bin bz2 ckpt ftz gguf gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth "
    "rar safetensors tar tflite tgz wasm xz zip zst"
)
LFS_NAME = re.compile(rf".*\.({LFS_SUFFIXES.replace(' ', '|')})")


def is_lfs(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub stores a file as an LFS object: by its name, its size, or a NUL in its first bytes."""
    return size > 0 and (size > REGULAR_LIMIT or b"\0" in sample or LFS_NAME.fullmatch(path) is not None)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a tree."""

    path: str
    blob: Blob
    lfs: bool

    @property
    def oid(self) -> str:
        """The git oid: of the content, or of the pointer of an LFS object (40 hex digits, not git's own)."""
        return hashlib.sha1(self.blob.sha256.encode()).hexdigest() if self.lfs else self.blob.git_sha

    @property
    def etag(self) -> str:
        """What identifies the content: sha256 of an LFS object, the git oid of a regular file."""
        return self.blob.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the pointer that stands for an LFS object in git: 125 and the digits of its size."""
        return 125 + len(str(self.blob.size))


def make_entry(path: str, content: Content, lfs: bool | None = None) -> Entry:
    """An entry; `lfs` None: by is_lfs."""
    blob = as_blob(content)
    if lfs is None:
        lfs = is_lfs(path, blob.size, blob.read(0, min(blob.size, 512)))
    return Entry(path, blob, lfs)


@dataclass(frozen=True, slots=True)
class Commit:
    """A revision of a repo."""

    oid: str
    parent: str | None
    title: str
    message: str
    user: str
    date: str
    files: Mapping[str, Entry]


@dataclass(slots=True)
class Pull:
    """A pull request; its commits are on refs/pr/{number}."""

    number: int
    title: str
    description: str
    user: str
    base: str
    status: str
    date: str


@dataclass(frozen=True, slots=True)
class Token:
    """An access token: whose it is, what it may do, and in which namespaces besides the user's own."""

    value: str
    user: str
    role: Role
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether the token's user belongs to the namespace."""
        return namespace == self.user or namespace in self.organizations

    def may_write(self, repo_id: str) -> bool:
        """Whether this is a write token of the repo's namespace."""
        return self.role == "write" and self.owns(repo_id.split("/")[0])


@dataclass(slots=True)
class Repo:
    """A repo: `id` is ORG/NAME, `kind` model, dataset or space."""

    id: str
    kind: str = "model"
    private: bool = False
    gated: Gated = False
    granted: set[str] = field(default_factory=set)  # users with access to a gated repo
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    pull_heads: dict[int, str] = field(default_factory=dict)
    objects: dict[str, Blob] = field(default_factory=dict)  # LFS objects by sha256, committed or not

    def resolve(self, revision: str = "main") -> Commit | None:
        """The commit that a branch, tag, refs/... name or oid stands for; None when there is none."""
        oid = self._head(revision)
        return self.commits.get(oid if oid is not None else revision)

    def _head(self, revision: str) -> str | None:
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            return self.pull_heads.get(int(match[1]))
        name = revision.removeprefix("refs/heads/")
        return self.branches.get(name) or self.tags.get(revision.removeprefix("refs/tags/"))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a revision; for tests on small repos."""
        commit = self.resolve(revision)
        return {} if commit is None else {path: entry.blob.read() for path, entry in commit.files.items()}

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """The commits of a revision, newest first."""
        commit = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent) if commit.parent is not None else None

    def add_commit(
        self,
        changes: Mapping[str, Content | Entry | None],
        *,
        revision: str = "main",
        title: str = "Update",
        message: str = "",
        user: str = "hub",
    ) -> Commit:
        """A commit on top of a branch (made when missing) or of refs/pr/N: None deletes a path."""
        parent = self.resolve(revision)
        files = {} if parent is None else dict(parent.files)
        for path, content in changes.items():
            if content is None:
                del files[path]
            else:
                files[path] = content if isinstance(content, Entry) else make_entry(path, content)
        commit = self._make_commit(parent, files, title, message, user)
        self.set_head(revision, commit.oid)
        return commit

    def _make_commit(
        self, parent: Commit | None, files: dict[str, Entry], title: str, message: str, user: str
    ) -> Commit:
        parent_oid = None if parent is None else parent.oid
        seed = [self.id, str(parent_oid), str(len(self.commits)), title]
        seed += [f"{path} {entry.blob.size} {_identity(entry)}" for path, entry in sorted(files.items())]
        oid = hashlib.sha1("\n".join(seed).encode()).hexdigest()
        commit = Commit(oid, parent_oid, title, message, user, timestamp(), files)
        self.commits[oid] = commit
        return commit

    def set_head(self, revision: str, oid: str) -> None:
        """Points a branch or refs/pr/N at a commit."""
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            self.pull_heads[int(match[1])] = oid
        else:
            self.branches[revision.removeprefix("refs/heads/")] = oid

    def find_object(self, sha256: str) -> Blob | None:
        """An LFS object of this repo: uploaded, or in any commit of a repo that was declared."""
        if sha256 in self.objects:
            return self.objects[sha256]
        for commit in self.commits.values():
            for entry in commit.files.values():
                if entry.lfs and entry.blob.sha256 == sha256:
                    self.objects[sha256] = entry.blob
                    return entry.blob
        return None


def _identity(entry: Entry) -> str:
    # A file on disk is not hashed when its repo is declared: path and mtime stand for its content.
    if isinstance(entry.blob, FileBlob) and "sha256" not in entry.blob.__dict__:
        return f"{entry.blob.path.name} {entry.blob.path.stat().st_mtime_ns}"
    return entry.blob.sha256


def folder_files(folder: Path, invent_above: int | None = None) -> dict[str, Content]:
    """Path in the repo -> file of everything below a folder.

    `invent_above`: files of more bytes than that get an invented sha256, for what is too large to hash (a sparse file).
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: _file_content(path, name, invent_above) for name, path in files.items()}


def _file_content(path: Path, name: str, invent_above: int | None) -> Content:
    if invent_above is None or path.stat().st_size <= invent_above:
        return path
    return FileBlob(path, hashlib.sha256(f"{name} {path.stat().st_size}".encode()).hexdigest())


def timestamp() -> str:
    """Now, as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def repo_key(kind: str, repo_id: str) -> str:
    """The name under which a repo is kept: ORG/NAME, datasets/ORG/NAME."""
    return repo_id if kind == "model" else f"{kind}s/{repo_id}"
