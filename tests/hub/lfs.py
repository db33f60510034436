"""LFS objects: what is missing (batch), parts of it (PUT to signed URLs on the other host), the end (complete, verify).

Files up to `part_size` come in one PUT, larger ones in parts. The parts are written to their place in one file; what is
complete and has the right sha256 moves to {root}/lfs/{sha256}. The requests are those of huggingface_hub/lfs.py.
"""

import hashlib
import os
import shutil
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

from tests.hub.blobs import FileBlob
from tests.hub.protocol import REPO, Answer, Call, HubError, json_answer, route
from tests.hub.reading import find_repo
from tests.hub.repos import Repo
from tests.hub.writing import require_write

OBJECTS = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects"
OBJECT = rf"(?:(?P<kind>datasets|spaces)/)?{REPO}/(?P<oid>[0-9a-f]{{64}})/(?P<size>\d+)"
PART = r"(?P<part_size>\d+)"


@route("POST", rf"{OBJECTS}/batch")
def batch(call: Call) -> Answer:
    repo, form = find_repo(call), call.json()
    # Who may open a pull request may upload to it: the client asks for this before it asks for the commit.
    require_write(call, repo, pull=True)
    if form.get("operation") != "upload":
        raise HubError(422, "only uploads")
    objects = [
        _actions(call, repo, item["oid"], item["size"], form.get("transfers", ["basic"])) for item in form["objects"]
    ]
    multipart = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    return json_answer({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _actions(call: Call, repo: Repo, oid: str, size: int, transfers: list[str]) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if repo.find_object(oid) is not None:
        return answer
    if size > call.hub.file_limit:
        message = f"the object is larger than {call.hub.file_limit} bytes"
        return {**answer, "error": {"code": 422, "message": message}}
    path = f"/{call.record.repo}/{oid}/{size}"
    verify = {"href": f"{call.hub.endpoint}/{call.record.repo}.git/info/lfs/objects/verify"}
    if size <= call.hub.part_size or "multipart" not in transfers:
        upload: dict[str, Any] = {"href": call.hub.sign("cdn", f"/upload{path}")}
    else:
        parts = f"{path}/{call.hub.part_size}"
        header = {
            str(number): call.hub.sign("cdn", f"/upload{parts}/{number}")
            for number in range(1, ceil(size / call.hub.part_size) + 1)
        }
        header["chunk_size"] = str(call.hub.part_size)
        upload = {"href": call.hub.sign("hub", f"/lfs-complete{parts}"), "header": header}
    return {**answer, "actions": {"upload": upload, "verify": verify}}


@route("PUT", rf"/upload/{OBJECT}", host="cdn")
def put_object(call: Call) -> Answer:
    repo, oid, size = _signed_object(call)
    digest = hashlib.sha256()
    descriptor, name = tempfile.mkstemp(dir=_folder(call.hub.root, "incoming"))
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in call.stream():
                digest.update(piece)
                file.write(piece)
        if call.record.received != size or digest.hexdigest() != oid:
            raise HubError(400, "BadDigest: size or sha256 is not what was announced")
        _keep(call, repo, oid, Path(name))
    finally:
        Path(name).unlink(missing_ok=True)
    return Answer(200, {"ETag": f'"{oid[:32]}"'})


@route("PUT", rf"/upload/{OBJECT}/{PART}/(?P<number>\d+)", host="cdn")
def put_part(call: Call) -> Answer:
    _, oid, size = _signed_object(call)
    part_size, number = int(call.groups["part_size"]), int(call.groups["number"])
    start = (number - 1) * part_size
    place = _folder(call.hub.root, "incoming") / f"{oid}.parts"
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for piece in call.stream():
            os.pwrite(descriptor, piece, start + call.record.received - len(piece))
    finally:
        os.close(descriptor)
    if call.record.received != min(part_size, size - start):
        raise HubError(400, "IncompleteBody")
    return Answer(200, {"ETag": f'"{oid[:24]}{number:08d}"'})


@route("POST", rf"/lfs-complete/{OBJECT}/{PART}")
def complete(call: Call) -> Answer:
    repo, oid, size = _signed_object(call)
    count = ceil(size / int(call.groups["part_size"]))
    expected = [{"partNumber": number, "etag": f'"{oid[:24]}{number:08d}"'} for number in range(1, count + 1)]
    if call.json().get("parts") != expected:
        raise HubError(400, "InvalidPart: not all parts have been uploaded")
    place = _folder(call.hub.root, "incoming") / f"{oid}.parts"
    if repo.find_object(oid) is None:
        if not place.exists() or place.stat().st_size != size or FileBlob(place).sha256 != oid:
            raise HubError(400, "BadDigest: size or sha256 is not what was announced")
        _keep(call, repo, oid, place)
    return json_answer({"success": True})


@route("POST", rf"{OBJECTS}/verify")
def verify(call: Call) -> Answer:
    repo, form = find_repo(call), call.json()
    require_write(call, repo, pull=True)
    blob = repo.find_object(form["oid"])
    if blob is None or blob.size != form["size"]:
        raise HubError(404, "LFS object not found")
    return json_answer({})


def _signed_object(call: Call) -> tuple[Repo, str, int]:
    call.hub.check_signature(call.raw_path, call.query)
    kind = call.groups.get("kind")
    call.record.repo = f"{kind}/{call.groups['repo']}" if kind else call.groups["repo"]
    repo = call.hub.repos.get(call.record.repo)
    if repo is None:
        raise HubError(404, "NoSuchBucket")
    return repo, call.groups["oid"], int(call.groups["size"])


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keep(call: Call, repo: Repo, oid: str, path: Path) -> None:
    kept = _folder(call.hub.root, "lfs") / oid
    shutil.move(path, kept)
    with call.hub.lock:
        repo.objects[oid] = FileBlob(kept, sha256=oid)
