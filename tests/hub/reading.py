"""What the Hub answers to readers: model info, trees, paths, references, commits, files and redirects to the CDN.

The shapes of the answers are what huggingface_hub reads: hf_api.ModelInfo, RepoFile, RepoFolder, GitRefs, and
file_download.get_hf_file_metadata for the headers.
"""

from typing import Any
from urllib.parse import parse_qs, quote

import yaml

from tests.hub.protocol import KIND, REPO, REVISION, Answer, Call, HubError, json_answer, ranged, route
from tests.hub.repos import Commit, Entry, Repo, Token

# Access


def find_repo(call: Call) -> Repo:
    """The repo of a request, if the asker may know of it. Raises HubError: 307 renamed, 401 and 404 RepoNotFound."""
    kind, name, token = call.groups.get("kind", "models").removesuffix("s"), call.groups["repo"], call.token
    key = name if kind == "model" else f"{kind}s/{name}"
    call.record.repo = key
    if key in call.hub.renamed:
        path = call.raw_path.replace(quote(name), quote(call.hub.renamed[key]), 1)
        raise HubError(307, "moved", headers={"Location": path + (f"?{call.query_text}" if call.query_text else "")})
    repo = call.hub.repos.get(key)
    if repo is None or (repo.private and (token is None or not token.owns(repo.id.split("/")[0]))):
        if token is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repo


def find_commit(call: Call, repo: Repo) -> Commit:
    """The commit of a request. Raises HubError 404 RevisionNotFound."""
    revision = call.groups.get("revision", "main")
    commit = repo.resolve(revision)
    if commit is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def require_grant(repo: Repo, token: Token | None) -> None:
    """Raises HubError 401 or 403 GatedRepo where the files of a gated repo are not for the asker."""
    if not repo.gated or (token is not None and (token.user in repo.granted or token.owns(repo.id.split("/")[0]))):
        return
    message = f"Access to {repo.kind} {repo.id} is restricted"
    if token is None:
        message += ". You must have access to it and be authenticated to access it. Please log in."
        raise HubError(401, message, "GatedRepo")
    raise HubError(403, f"{message} and you are not in the authorized list.", "GatedRepo")


# Information


@route("GET", r"/api/whoami-v2")
def whoami(call: Call) -> Answer:
    token = call.token
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return json_answer(
        {
            "type": "user",
            "id": token.user,
            "name": token.user,
            "fullname": token.user,
            "isPro": False,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in token.organizations],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": "test", "role": token.role, "createdAt": "2026-01-01T00:00:00.000Z"},
            },
        }
    )


@route("GET", rf"/api/{KIND}/{REPO}")
@route("GET", rf"/api/{KIND}/{REPO}/revision/{REVISION}")
def repo_info(call: Call) -> Answer:
    repo = find_repo(call)
    commit = find_commit(call, repo) if repo.commits or "revision" in call.groups else None
    blobs = call.flag("blobs")
    files = [] if commit is None else [commit.files[path] for path in sorted(commit.files)]
    info: dict[str, Any] = {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.oid if commit is not None else "0" * 40,
        "lastModified": commit.date if commit is not None else None,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [sibling(entry, blobs) for entry in files],
        "cardData": card_data(commit),
    }
    return json_answer(info)


def sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    """A file in model info."""
    if not blobs:
        return {"rfilename": entry.path}
    item = {"rfilename": entry.path, "size": entry.blob.size, "blobId": entry.oid}
    if entry.lfs:
        lfs = {"sha256": entry.blob.sha256, "size": entry.blob.size, "pointerSize": entry.pointer_size}
        return {**item, "lfs": lfs}
    return item


def card_data(commit: Commit | None) -> dict[str, Any] | None:
    """The front matter of README.md."""
    if commit is None or "README.md" not in commit.files:
        return None
    parts = commit.files["README.md"].blob.read().decode(errors="replace").split("---\n", 2)
    try:
        data = yaml.safe_load(parts[1]) if len(parts) == 3 and parts[0] == "" else None
    except yaml.YAMLError:
        return None
    return data if isinstance(data, dict) else None


@route("GET", rf"/api/{KIND}/{REPO}/auth-check")
def auth_check(call: Call) -> Answer:
    repo = find_repo(call)
    require_grant(repo, call.token)
    return json_answer({})


@route("GET", rf"/api/{KIND}/{REPO}/refs")
def refs(call: Call) -> Answer:
    repo = find_repo(call)
    answer = {
        "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in repo.branches.items()],
        "converts": [],
        "tags": [_ref(name, f"refs/tags/{name}", oid) for name, oid in repo.tags.items()],
    }
    if call.flag("include_prs"):
        pulls = repo.pull_heads.items()
        answer["pullRequests"] = [_ref(f"refs/pr/{number}", f"refs/pr/{number}", oid) for number, oid in pulls]
    return json_answer(answer)


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


@route("GET", rf"/api/{KIND}/{REPO}/commits/{REVISION}")
def commits(call: Call) -> Answer:
    repo = find_repo(call)
    find_commit(call, repo)
    return json_answer(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.user}],
                "date": commit.date,
            }
            for commit in repo.history(call.groups["revision"])
        ]
    )


# Trees


@route("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}")
@route("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}/(?P<path>.+)")
def tree(call: Call) -> Answer:
    repo = find_repo(call)
    commit = find_commit(call, repo)
    folder = call.groups.get("path", "").strip("/")
    if folder and not any(path.startswith(f"{folder}/") for path in commit.files):
        raise HubError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
    items = listing(commit, folder, recursive=call.flag("recursive"))
    size = min(call.hub.page_size, int(call.query.get("limit", [str(call.hub.page_size)])[0]))
    start = int(call.query.get("cursor", ["0"])[0])
    headers = {}
    if start + size < len(items):
        query = "&".join(f"{key}={call.query[key][0]}" for key in ("recursive", "expand", "limit") if key in call.query)
        target = f"{call.hub.endpoint}{call.raw_path}?{query}{'&' if query else ''}cursor={start + size}"
        headers["Link"] = f'<{target}>; rel="next"'
    page = items[start : start + size]
    return json_answer([describe(call, item, commit, call.flag("expand")) for item in page], headers=headers)


def listing(commit: Commit, folder: str, *, recursive: bool) -> list[Entry | str]:
    """Files (entries) and folders (paths) in a folder, sorted by path."""
    prefix = f"{folder}/" if folder else ""
    items: dict[str, Entry | str] = {}
    for path, entry in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        parents = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        items.update((parent, parent) for parent in (parents if recursive else parents[:1]))
        if recursive or len(parts) == 1:
            items[path] = entry
    return [items[path] for path in sorted(items)]


def describe(call: Call, item: Entry | str, commit: Commit, expand: bool) -> dict[str, Any]:
    """A file or a folder in a tree."""
    if isinstance(item, str):
        answer: dict[str, Any] = {"type": "directory", "oid": commit.oid, "size": 0, "path": item}
    else:
        answer = {"type": "file", "oid": item.oid, "size": item.blob.size, "path": item.path}
        if item.lfs:
            answer["lfs"] = {"oid": item.blob.sha256, "size": item.blob.size, "pointerSize": item.pointer_size}
            if (xet_hash := call.hub.xet_hash(item)) is not None:
                answer["xetHash"] = xet_hash
    if expand:
        answer["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return answer


@route("POST", rf"/api/{KIND}/{REPO}/paths-info/{REVISION}")
def paths_info(call: Call) -> Answer:
    repo = find_repo(call)
    commit = find_commit(call, repo)
    if "json" in call.headers.get("Content-Type", ""):
        form = call.json()
        paths, expand = form["paths"], bool(form.get("expand"))
    else:
        fields = parse_qs(call.read().decode())
        paths, expand = fields.get("paths", []), fields.get("expand", [""])[0].lower() in ("1", "true")
    wanted = {path.strip("/") for path in paths}
    found = [commit.files[path] for path in sorted(wanted & commit.files.keys())]
    folders = sorted(
        path for path in wanted - commit.files.keys() if any(f.startswith(f"{path}/") for f in commit.files)
    )
    return json_answer([describe(call, item, commit, expand) for item in (*found, *folders)])


# Files


@route("GET", rf"/(?:(?P<kind>datasets|spaces)/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    repo = find_repo(call)
    require_grant(repo, call.token)
    commit = find_commit(call, repo)
    path = call.groups["path"]
    call.record.file = path
    headers = {"X-Repo-Commit": commit.oid}
    entry = commit.files.get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["X-Linked-Size"] = str(entry.blob.size)
    headers["X-Linked-ETag"] = headers["ETag"] = f'"{entry.etag}"'
    if (xet_hash := call.hub.xet_hash(entry)) is not None:
        refresh = f"{call.hub.endpoint}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": refresh, "Link": f'<{refresh}>; rel="xet-auth"'}
    if entry.lfs and call.hub.cdn:
        call.record.file = None  # the content comes from the CDN
        headers["Location"] = cdn_url(call, repo, entry)
        return Answer(302, headers, b"Found. Redirecting")
    return ranged(entry.blob, call.headers.get("Range"), headers)


def cdn_url(call: Call, repo: Repo, entry: Entry) -> str:
    """The signed URL of an LFS object."""
    name = entry.path.rsplit("/", 1)[-1]
    disposition = quote(f'attachment; filename="{quote(name)}";', safe="")
    query = f"response-content-disposition={disposition}&Expires=3600"
    repo.objects.setdefault(entry.blob.sha256, entry.blob)
    return call.hub.sign("cdn", f"/{call.record.repo}/{entry.blob.sha256}/{entry.path}", query)


@route("GET", r"/(?P<key>.+)/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)", host="cdn")
def cdn(call: Call) -> Answer:
    call.hub.check_signature(call.raw_path, call.query)
    call.record.repo, call.record.file = call.groups["key"], call.groups["path"]
    repo = call.hub.repos.get(call.groups["key"])
    blob = repo.find_object(call.groups["sha256"]) if repo is not None else None
    if blob is None:
        raise HubError(404, "NoSuchKey")
    headers = {"ETag": f'"{call.groups["sha256"][:32]}"'}
    headers["Content-Disposition"] = call.query.get("response-content-disposition", [""])[0]
    return ranged(blob, call.headers.get("Range"), headers)


@route("GET", r"/.*", host="stranger")
@route("POST", r"/.*", host="stranger")
@route("PUT", r"/.*", host="stranger")
def stranger(call: Call) -> Answer:
    """Another host, which takes what it gets."""
    return Answer(200, {"X-Repo-Commit": "0" * 40, "ETag": '"stranger"'}, b"from a stranger")
