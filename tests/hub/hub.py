"""The Hub: its hosts, its repos, its tokens, its faults and its record."""

import hashlib
import hmac
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import tests.hub.admin
import tests.hub.lfs
import tests.hub.reading
import tests.hub.writing  # noqa: F401
from tests.hub.blobs import Blob, Content
from tests.hub.faults import INVALID_TOKEN, Fault, Faults
from tests.hub.protocol import HubError
from tests.hub.record import Log, Request, select, sent_by_file
from tests.hub.repos import Commit, Entry, Gated, Repo, Role, Token, folder_files, repo_key
from tests.hub.server import Server
from tests.hub.xet import XetStore

# Three addresses, because the client takes two ports of one address for the same host.
ADDRESSES = {"hub": "127.0.0.1", "cdn": "127.0.0.2", "stranger": "127.0.0.3"}
WRITE_TOKEN = "hf_write_token_of_alice"
READ_TOKEN = "hf_read_token_of_bob"


class Hub:
    """A Hub on loopback, running inside `with`.

    `root` keeps what is uploaded (None: a temporary folder); `port` 0: any free one; `log`: a file for the record.
    With `cdn` LFS files are redirected to another host by signed URLs, as the real Hub does; `page_size`: entries of a
    page of a tree; `part_size`: LFS files larger than that many bytes are uploaded in parts of it; larger than
    `file_limit`: not at all. With `xet` LFS files go by xet (see xet.py) where the client has hf_xet.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        port: int = 0,
        log: Path | None = None,
        cdn: bool = True,
        page_size: int = 1000,
        part_size: int = 64 << 20,
        file_limit: int = 500 * 10**9,
        xet: bool = False,
        seed: int = 0,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="hub-") if root is None else None
        self.root = Path(self._temporary.name) if self._temporary is not None else Path(str(root))
        self.port = port
        self.cdn = cdn
        self.page_size = page_size
        self.part_size = part_size
        self.file_limit = file_limit
        self.xet = XetStore(self.root / "xet") if xet else None
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: dict[str, Token] = {}
        self.faults = Faults(seed)
        self.log = Log(log)
        self.servers: dict[str, Server] = {}
        self.add_token(WRITE_TOKEN, "alice", "write", ("ORG",))
        self.add_token(READ_TOKEN, "bob", "read")

    def __enter__(self) -> Self:
        for name, address in ADDRESSES.items():
            self.servers[name] = Server(self, name, address, self.port if name == "hub" else 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self.servers.values():
            server.stop()
        self.log.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    # Where it is

    @property
    def urls(self) -> dict[str, str]:
        """URL by host: hub, cdn, stranger."""
        return {name: server.url for name, server in self.servers.items()}

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return self.servers["hub"].url

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a process whose huggingface_hub shall talk to this Hub alone; `home`: its HF_HOME."""
        return process_environment(self.endpoint, home, token, xet=self.xet is not None)

    def find_object(self, repo: Repo, sha256: str) -> Blob | None:
        """An LFS object of a repo, or a file that has been uploaded by xet."""
        blob = repo.find_object(sha256)
        if blob is None and self.xet is not None and (blob := self.xet.find(sha256)) is not None:
            repo.objects[sha256] = blob
        return blob

    def xet_hash(self, entry: Entry) -> str | None:
        """The xet hash of a file, where this Hub has xet."""
        return self.xet.hash_of(entry.blob) if self.xet is not None and entry.lfs else None

    # What it holds

    def add_repo(
        self,
        repo_id: str,
        content: Path | Mapping[str, Content] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
        gated: Gated = False,
        granted: tuple[str, ...] = (),
        renamed_to: str | None = None,
    ) -> Repo:
        """A repo ORG/NAME with one commit: the files of a folder, or path -> bytes, file or SparseFile.

        `renamed_to`: the repo has that name, and `repo_id` leads there by 307. `granted`: users who may read a gated
        repo. More commits: `Repo.add_commit`.
        """
        name = renamed_to or repo_id
        repo = Repo(name, kind, private, gated, set(granted))
        if content is not None:
            repo.add_commit(folder_files(content) if isinstance(content, Path) else content, title="initial commit")
        with self.lock:
            self.repos[repo_key(kind, name)] = repo
            if renamed_to is not None:
                self.renamed[repo_key(kind, repo_id)] = renamed_to
        return repo

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """A repo. Raises KeyError."""
        return self.repos[repo_key(kind, repo_id)]

    def add_token(self, value: str, user: str, role: Role, organizations: tuple[str, ...] = ()) -> None:
        """A token that the Hub accepts."""
        self.tokens[value] = Token(value, user, role, organizations)

    def authenticate(self, authorization: str | None) -> Token | None:
        """The token of an Authorization header. Raises HubError 401 for an unknown one."""
        if authorization is None:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise HubError(401, INVALID_TOKEN)
        return token

    def commit_fault(self, commit: Mapping[str, Mapping[str, str] | str]) -> Commit:
        """The commit of a fault that moves main: {"repo": ORG/NAME, "files": {path: text}}."""
        repo, files = commit["repo"], commit["files"]
        if not isinstance(repo, str) or isinstance(files, str):
            raise TypeError("a commit is {repo: name, files: {path: text}}")
        with self.lock:
            return self.repo(repo).add_commit({path: text.encode() for path, text in files.items()})

    # What happens and what happened

    def arm(self, fault: Fault) -> Fault:
        """Arms a fault."""
        return self.faults.arm(fault)

    @property
    def requests(self) -> list[Request]:
        """The record."""
        return self.log.requests()

    def select(self, **matching: Any) -> list[Request]:
        """Requests by method, path pattern and host."""
        return select(self.requests, **matching)

    def sent_by_file(self) -> Counter[str]:
        """Bytes of content sent, by path in the repo."""
        return sent_by_file(self.requests)

    @property
    def uploaded_bytes(self) -> int:
        """Bytes of LFS content received."""
        return sum(request.received for request in self.requests if request.method == "PUT")

    def leaked_tokens(self) -> list[Request]:
        """Requests to other hosts than the Hub itself that carried a token."""
        return [request for request in self.requests if request.host != "hub" and request.token is not None]

    # Signed URLs

    def sign(self, host: str, path: str, query: str = "") -> str:
        """A URL on a host that needs no token; `path` is quoted here."""
        path = quote(path)
        return f"{self.servers[host].url}{path}?{query}{'&' if query else ''}Signature={self._signature(path)}"

    def check_signature(self, raw_path: str, query: Mapping[str, list[str]]) -> None:
        """Raises HubError 403 where a URL was not signed by this Hub."""
        if query.get("Signature") != [self._signature(raw_path)]:
            raise HubError(403, "Access denied: the signature does not match")

    def _signature(self, raw_path: str) -> str:
        return hmac.new(b"tests.hub", raw_path.encode(), hashlib.sha256).hexdigest()


def process_environment(endpoint: str, home: Path, token: str | None, *, xet: bool = False) -> dict[str, str]:
    """Variables for a process whose huggingface_hub shall talk to a Hub on loopback alone.

    HF_HUB_DISABLE_XET: where hf_xet is installed, the client uploads by xet without asking whether the Hub has it.
    """
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": str(int(not xet)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": ",".join(ADDRESSES.values()),
    }
    return variables if token is None else {**variables, "HF_TOKEN": token}
