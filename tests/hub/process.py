"""The Hub in a process of its own: what a test or a benchmark starts, and what runs there.

with HubProcess(root, "--part-size", "1000000") as hub:
    hub.endpoint, hub.arm(Fault(status=503, path="/api/*")), hub.requests, hub.files("ORG/NAME")
"""

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.hub.faults import Fault, parse_fault
from tests.hub.hub import Hub, process_environment
from tests.hub.record import Request
from tests.hub.repos import folder_files

STATE = ".hub"  # folder in the root with what is uploaded and the record


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of `python -m tests.hub`."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description="A Hugging Face Hub on loopback.")
    parser.add_argument("--root", type=Path, required=True, help="serves every folder ROOT/ORG/NAME as a repo")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", type=Path, help="JSON lines, one per request; default ROOT/.hub/requests.jsonl")
    parser.add_argument("--faults", type=Path, help="JSON: a list of faults to arm")
    parser.add_argument("--no-cdn", action="store_true", help="serves LFS files without a redirect to another host")
    parser.add_argument("--page-size", type=int, default=1000)
    parser.add_argument("--part-size", type=int, default=64 << 20)
    parser.add_argument("--invent-above", type=int, help="files of more bytes get an invented sha256: no time to hash")
    parser.add_argument("--xet", action="store_true", help="LFS files go by xet where the client has hf_xet")
    return parser.parse_args(arguments)


def make_hub(options: argparse.Namespace) -> Hub:
    """The Hub that the command line describes, not started yet."""
    state = options.root / STATE
    state.mkdir(parents=True, exist_ok=True)
    hub = Hub(
        state,
        port=options.port,
        log=options.log or state / "requests.jsonl",
        cdn=not options.no_cdn,
        page_size=options.page_size,
        part_size=options.part_size,
        xet=options.xet,
    )
    for folder in sorted(options.root.glob("[!.]*/*/")):
        files = folder_files(folder, options.invent_above)
        hub.add_repo(folder.relative_to(options.root).as_posix(), files)
    if options.faults is not None:
        hub.faults.extend([parse_fault(values) for values in json.loads(options.faults.read_text())])
    return hub


def main(arguments: Sequence[str]) -> None:
    """Runs until SIGTERM or SIGINT; the first line of stdout is a JSON object with the URLs: hub, cdn, stranger."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with make_hub(parse_arguments(arguments)) as hub:
        sys.stdout.write(json.dumps(hub.urls) + "\n")
        sys.stdout.flush()
        signal.sigwait(signals)


class HubProcess:
    """`python -m tests.hub --root ROOT` and more arguments, from `with` to its end."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.root = root
        self._xet = "--xet" in arguments
        command = [sys.executable, "-m", "tests.hub", "--root", str(root), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the Hub did not start: exit code {self._process.wait()}")
        self.urls: dict[str, str] = json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """Ends the process."""
        self._process.send_signal(signal_number)
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return self.urls["hub"]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """As Hub.environment."""
        return process_environment(self.endpoint, home, token, xet=self._xet)

    def arm(self, *faults: Fault) -> None:
        """Arms faults."""
        self._ask("POST", "faults", [asdict(fault) for fault in faults])

    def fired(self) -> list[int]:
        """How often each armed fault has acted."""
        answer: list[int] = self._ask("GET", "faults")
        return answer

    def disarm(self) -> None:
        """Removes all faults."""
        self._ask("DELETE", "faults")

    @property
    def repos(self) -> dict[str, dict[str, Any]]:
        """Every repo: private, heads, files by reference as [size, etag], titles of the commits of main."""
        answer: dict[str, dict[str, Any]] = self._ask("GET", "repos")
        return answer

    def files(self, repo: str, revision: str = "main") -> dict[str, tuple[int, str]]:
        """Path -> size and etag (sha256 of an LFS file) of a branch, a tag or refs/pr/N."""
        files = self.repos[repo]["files"][revision]
        return {path: (size, etag) for path, (size, etag) in files.items()}

    @property
    def requests(self) -> list[Request]:
        """The record of the requests that are done."""
        lines = (self.root / STATE / "requests.jsonl").read_text().splitlines()
        return [Request(**json.loads(line)) for line in lines]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.endpoint}/-/{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            return json.load(response)
