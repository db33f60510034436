"""How a Hub in a process of its own is steered: paths below /-/, without token, record or faults."""

from typing import Any

from tests.hub.faults import parse_fault
from tests.hub.protocol import Answer, Call, HubError, json_answer, route
from tests.hub.repos import Repo


@route("POST", r"/-/faults")
def arm(call: Call) -> Answer:
    """Arms the faults of a list of JSON objects."""
    try:
        faults = [parse_fault(values) for values in call.json()]
    except (TypeError, ValueError) as error:
        raise HubError(400, str(error)) from error
    call.hub.faults.extend(faults)
    return json_answer({})


@route("GET", r"/-/faults")
def fired(call: Call) -> Answer:
    """How often each armed fault has acted."""
    return json_answer([fault.fired for fault in call.hub.faults.armed])


@route("DELETE", r"/-/faults")
def disarm(call: Call) -> Answer:
    """Removes all faults."""
    call.hub.faults.clear()
    return json_answer({})


@route("GET", r"/-/repos")
def state(call: Call) -> Answer:
    """Every repo: references, files by reference (size, etag, lfs), commits of main."""
    with call.hub.lock:
        return json_answer({key: _describe(repo) for key, repo in call.hub.repos.items()})


def _describe(repo: Repo) -> dict[str, Any]:
    heads = repo.branches | repo.tags | {f"refs/pr/{number}": oid for number, oid in repo.pull_heads.items()}
    files = {
        name: {path: [entry.blob.size, entry.etag] for path, entry in repo.commits[oid].files.items()}
        for name, oid in heads.items()
    }
    commits = [commit.title for commit in repo.history()]
    return {"private": repo.private, "heads": heads, "files": files, "commits": commits}
