"""What the Hub answers to writers: repos, branches and tags, upload modes, commits, pull requests."""

import base64
import binascii
import fnmatch
import json
from typing import TYPE_CHECKING, Any

from tests.hub.blobs import Blob, Content
from tests.hub.cards import check_card
from tests.hub.protocol import KIND, REPO, REVISION, Answer, Call, HubError, json_answer, route
from tests.hub.reading import find_commit, find_repo
from tests.hub.repos import (
    LFS_SUFFIXES,
    REGULAR_LIMIT,
    Entry,
    Pull,
    Repo,
    Token,
    is_lfs,
    make_entry,
    repo_key,
    timestamp,
)

if TYPE_CHECKING:
    from tests.hub.hub import Hub

Changes = dict[str, Content | Entry | None]

ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split(" "))


def require_token(call: Call) -> Token:
    """A write token. Raises HubError 401 without any, 403 for a read token."""
    token = call.token
    if token is None:
        raise HubError(401, "Invalid username or password.")
    if token.role != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
    return token


def require_write(call: Call, repo: Repo, *, pull: bool = False) -> Token:
    """A token that may write to the repo; a pull request may come from anybody. Raises HubError 401 or 403."""
    token = require_token(call)
    if not pull and not token.may_write(repo.id):
        raise HubError(403, f'Forbidden: you don\'t have the rights to write to "{repo.id}".')
    return token


@route("GET", rf"/api/{KIND}/{REPO}/auth-check/write")
def auth_check_write(call: Call) -> Answer:
    require_write(call, find_repo(call))
    return json_answer({})


# Repos


def _named(call: Call, form: dict[str, Any], token: Token) -> tuple[str, str]:
    name, kind = f"{form.get('organization') or token.user}/{form['name']}", form.get("type") or "model"
    if not token.may_write(name):
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{name.split("/")[0]}"')
    call.record.repo = repo_key(kind, name)
    return name, kind


@route("POST", r"/api/repos/create")
def create_repo(call: Call) -> Answer:
    token, form = require_token(call), call.json()
    name, kind = _named(call, form, token)
    url = {"url": f"{call.hub.endpoint}/{repo_key(kind, name)}", "name": name, "type": kind}
    with call.hub.lock:
        if repo_key(kind, name) in call.hub.repos:
            return json_answer({**url, "error": f"You already created this {kind} repo"}, 409)
        private = form.get("visibility") == "private" or form.get("private") is True
        call.hub.add_repo(name, {".gitattributes": ATTRIBUTES.encode()}, kind=kind, private=private)
    return json_answer(url)


@route("DELETE", r"/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    name, kind = _named(call, call.json(), require_token(call))
    if call.hub.repos.pop(repo_key(kind, name), None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return json_answer({})


@route("POST", r"/api/repos/move")
def move_repo(call: Call) -> Answer:
    token, form = require_token(call), call.json()
    kind, old, new = form.get("type") or "model", form["fromRepo"], form["toRepo"]
    with call.hub.lock:
        repo = call.hub.repos.get(repo_key(kind, old))
        if repo is None or not (token.may_write(old) and token.may_write(new)):
            raise HubError(404, "Repository not found", "RepoNotFound")
        repo.id = new
        call.hub.repos[repo_key(kind, new)] = call.hub.repos.pop(repo_key(kind, old))
        call.hub.renamed[repo_key(kind, old)] = new
    return json_answer({})


@route("PUT", rf"/api/{KIND}/{REPO}/settings")
def settings(call: Call) -> Answer:
    repo, form = find_repo(call), call.json()
    require_write(call, repo)
    repo.private = form.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = form.get("gated", repo.gated)
    return json_answer({"private": repo.private, "gated": repo.gated})


# References


@route("POST", rf"/api/{KIND}/{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(call: Call) -> Answer:
    repo, branch = find_repo(call), call.groups["branch"]
    require_write(call, repo)
    if branch.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {branch}")
    with call.hub.lock:
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        call.groups["revision"] = call.json().get("startingPoint", "main")
        repo.branches[branch] = find_commit(call, repo).oid
    return json_answer({})


@route("DELETE", rf"/api/{KIND}/{REPO}/branch/(?P<branch>[^/]+)")
def delete_branch(call: Call) -> Answer:
    repo, branch = find_repo(call), call.groups["branch"]
    require_write(call, repo)
    if branch == "main":
        raise HubError(403, "Cannot delete branch main")
    if repo.branches.pop(branch, None) is None:
        raise HubError(404, f"Reference does not exist: {branch}", "RevisionNotFound")
    return json_answer({})


@route("POST", rf"/api/{KIND}/{REPO}/tag/{REVISION}")
def create_tag(call: Call) -> Answer:
    repo = find_repo(call)
    require_write(call, repo)
    with call.hub.lock:
        tag = call.json()["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Reference already exists: {tag}")
        repo.tags[tag] = find_commit(call, repo).oid
    return json_answer({})


# Before a commit


@route("POST", r"/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    errors, warnings = check_card(call.json()["content"])
    answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_answer(answer, 400 if errors else 200)


@route("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}")
def preupload(call: Call) -> Answer:
    repo = find_repo(call)
    require_write(call, repo, pull=call.flag("create_pr"))
    files = find_commit(call, repo).files
    form = call.json()
    ignored = form.get("gitIgnore") or (files[".gitignore"].blob.read().decode() if ".gitignore" in files else "")
    return json_answer({"files": [_upload_mode(item, files.get(item["path"]), ignored) for item in form["files"]]})


def _upload_mode(item: dict[str, Any], present: Entry | None, ignored: str) -> dict[str, Any]:
    lfs = is_lfs(item["path"], item["size"], base64.b64decode(item["sample"]))
    answer = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular"}
    answer["shouldIgnore"] = is_ignored(item["path"], ignored)
    # What the client compares with its own file, to leave an unchanged one out: sha256 of LFS, git oid of regular.
    return answer if present is None else {**answer, "oid": present.etag}


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether a .gitignore names a path: plain patterns and folders, no negation."""
    patterns = [line.strip().rstrip("/") for line in gitignore.splitlines() if line.strip() and line[0] != "#"]
    parts = path.split("/")
    names = [*parts, *("/".join(parts[: depth + 1]) for depth in range(len(parts)))]
    return any(fnmatch.fnmatchcase(name, pattern.removeprefix("/")) for name in names for pattern in patterns)


# Commits


@route("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}")
def commit(call: Call) -> Answer:
    repo, create_pr = find_repo(call), call.flag("create_pr")
    token = require_write(call, repo, pull=create_pr)
    header, operations = _read_commit(call)
    revision = call.groups["revision"]
    with call.hub.lock:
        head = find_commit(call, repo)
        if revision.removeprefix("refs/heads/") not in repo.branches and not revision.startswith("refs/pr/"):
            raise HubError(400, f"{revision} is not a branch")
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        changes = _changes(call.hub, repo, head.files.keys(), operations)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if create_pr:
            pull = open_pull(repo, header["summary"], header.get("description", ""), token.user, head.oid)
            revision = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = f"{call.hub.endpoint}/{call.record.repo}/discussions/{pull.number}"
        made = repo.add_commit(
            changes,
            revision=revision,
            title=header["summary"],
            message=header.get("description", ""),
            user=token.user,
        )
    answer["commitOid"] = made.oid
    answer["commitUrl"] = f"{call.hub.endpoint}/{call.record.repo}/commit/{made.oid}"
    return json_answer(answer)


def _read_commit(call: Call) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        lines = [json.loads(line) for line in call.read().splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, f"malformed ndjson: {error}") from error
    if not lines or lines[0].get("key") != "header":
        raise HubError(400, "the first line of a commit is its header")
    return lines[0]["value"], lines[1:]


def _changes(
    hub: "Hub", repo: Repo, present: Any, operations: list[dict[str, Any]]
) -> dict[str, Content | Entry | None]:
    changes: dict[str, Content | Entry | None] = {}
    for operation in operations:
        value = operation["value"]
        path = _checked_path(value["path"])
        match operation["key"]:
            case "file":
                changes[path] = _regular(path, value)
            case "lfsFile":
                changes[path] = _lfs(hub.find_object(repo, value["oid"]), path)
            case "deletedFile" | "deletedFolder" as key:
                prefix = f"{path.rstrip('/')}/"
                gone = [path] if key == "deletedFile" else [name for name in present if name.startswith(prefix)]
                if not gone or not set(gone) <= set(present):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                changes.update(dict.fromkeys(gone))
            case key:
                raise HubError(400, f"unknown operation {key!r}")
    return changes


def _checked_path(path: str) -> str:
    parts = path.removesuffix("/").split("/")
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"invalid path {path!r}")
    return path


def _regular(path: str, value: dict[str, Any]) -> Entry:
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise HubError(400, f"{path}: malformed base64") from error
    if len(content) > REGULAR_LIMIT:
        raise HubError(400, f"{path} is larger than 10 MB: upload it by LFS")
    return make_entry(path, content, lfs=False)


def _lfs(blob: Blob | None, path: str) -> Entry:
    if blob is None:
        raise HubError(
            400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}"
        )
    return Entry(path, blob, lfs=True)


# Pull requests


def open_pull(repo: Repo, title: str, description: str, user: str, head: str) -> Pull:
    """A new pull request against main, on refs/pr/N, which points at `head`."""
    pull = Pull(len(repo.pulls) + 1, title, description, user, "refs/heads/main", "draft", timestamp())
    repo.pulls[pull.number] = pull
    repo.set_head(f"refs/pr/{pull.number}", head)
    return pull


@route("POST", rf"/api/{KIND}/{REPO}/discussions")
def create_discussion(call: Call) -> Answer:
    repo, form = find_repo(call), call.json()
    token = require_write(call, repo, pull=True)
    if not form.get("pullRequest"):
        raise HubError(400, "this Hub has pull requests only")
    with call.hub.lock:
        pull = open_pull(repo, form["title"], form.get("description", ""), token.user, find_commit(call, repo).oid)
    return json_answer(describe_pull(call, repo, pull))


@route("GET", rf"/api/{KIND}/{REPO}/discussions")
def discussions(call: Call) -> Answer:
    """The pull requests of a repository, by author, on one page: what HfApi.get_repo_discussions asks for."""
    repo = find_repo(call)
    author = call.query.get("author", [None])[0]
    found = [describe_pull(call, repo, pull) for pull in repo.pulls.values() if author in (None, pull.user)]
    page = found if call.query.get("p", ["0"])[0] == "0" else []
    return json_answer({"count": len(found), "start": 0, "discussions": page})


def find_pull(call: Call, repo: Repo) -> Pull:
    """The pull request of a request. Raises HubError 404."""
    pull = repo.pulls.get(int(call.groups["number"]))
    if pull is None:
        raise HubError(404, "Discussion not found")
    return pull


@route("GET", rf"/api/{KIND}/{REPO}/discussions/(?P<number>\d+)")
def discussion(call: Call) -> Answer:
    repo = find_repo(call)
    return json_answer(describe_pull(call, repo, find_pull(call, repo)))


@route("POST", rf"/api/{KIND}/{REPO}/discussions/(?P<number>\d+)/merge")
def merge_pull(call: Call) -> Answer:
    repo = find_repo(call)
    require_write(call, repo)
    with call.hub.lock:
        pull = find_pull(call, repo)
        oids = [made.oid for made in repo.history(f"refs/pr/{pull.number}")]
        if repo.branches["main"] not in oids:
            raise HubError(409, "main has moved since: this Hub merges by moving main forward only")
        repo.branches["main"] = oids[0]
        pull.status = "merged"
    return json_answer({})


def describe_pull(call: Call, repo: Repo, pull: Pull) -> dict[str, Any]:
    """A pull request as huggingface_hub reads it."""
    return {
        "title": pull.title,
        "num": pull.number,
        "author": {"name": pull.user},
        "createdAt": pull.date,
        "status": pull.status,
        "repo": {"name": repo.id, "type": repo.kind},
        "isPullRequest": True,
        "changes": {"base": pull.base},
        "filesWithConflicts": [],
        "events": [],
    }
