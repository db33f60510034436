"""HTTP/1.1 on loopback: reads a request, lets a fault act on it, sends the answer of its route and keeps the record."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from tests.hub.blobs import CHUNK, FileBlob
from tests.hub.faults import NO_FAULT, Fault
from tests.hub.protocol import Answer, Call, HubError, dispatch, error_answer
from tests.hub.record import Request

if TYPE_CHECKING:
    from tests.hub.hub import Hub

ADMINISTRATION = "/-/"
SENDFILE_CHUNK = 16 << 20
TRICKLES_PER_SECOND = 20
POLL_SECONDS = 0.02  # how long it takes to stop


class ConnectionEndedError(Exception):
    """The connection has been ended by a fault."""


class Server(ThreadingHTTPServer):
    """One host of the Hub; closes the connections that clients keep alive when it is stopped."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: "Hub", name: str, address: str, port: int) -> None:
        self.hub = hub
        self.name = name
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((address, port), Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(POLL_SECONDS,), name=f"hub-{name}", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """http://address:port."""
        address, port = self.server_address[:2]
        return f"http://{address!s}:{port}"

    def stop(self) -> None:
        """Stops listening and ends all connections."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def track(self, connection: socket.socket) -> None:
        """Remembers a connection that is open."""
        with self._lock:
            self._open.add(connection)

    def forget(self, connection: socket.socket) -> None:
        """A connection has ended."""
        with self._lock:
            self._open.discard(connection)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "tests.hub"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.track(self.connection)

    def finish(self) -> None:
        self.server.forget(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """The record is kept elsewhere."""

    def serve(self) -> None:
        """Answers one request."""
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        name, method, path = self.server.name, self.command, unquote(parts.path)
        administrative = name == "hub" and path.startswith(ADMINISTRATION)
        faultless = administrative or name == "stranger"
        fault = NO_FAULT if faultless else self.server.hub.faults.take(name, method, path)
        self.body_left: int | None = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body_left = None
        self.record = Request(name, method, path, parts.query, headers, time.time(), fault=fault is not NO_FAULT)
        hub, body = self.server.hub, partial(self.body, fault)
        call = Call(hub, name, method, parts.path, parts.query, self.headers, self.record, body)
        with contextlib.nullcontext() if administrative else hub.log.record(self.record):
            try:
                self.answer(call, fault)
            except (ConnectionEndedError, OSError, ValueError):  # ValueError: the file of a socket that a fault closed
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve  # noqa: N815

    # The body of the request

    def body(self, fault: Fault) -> Iterator[bytes]:
        """The body in pieces, counted; a fault may end the connection in the middle of a PUT."""
        for piece in self._chunked() if self.body_left is None else self._sized():
            self.record.received += len(piece)
            if self.command == "PUT":
                self._end_upload(fault)
                if fault.trickle:
                    time.sleep(len(piece) / fault.trickle)
            yield piece

    def _sized(self) -> Iterator[bytes]:
        while self.body_left and (piece := self.rfile.read1(min(CHUNK, self.body_left))):
            self.body_left -= len(piece)
            yield piece
        if self.body_left:
            raise ConnectionEndedError

    def _chunked(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.body_left = 0

    def _end_upload(self, fault: Fault) -> None:
        if fault.cut_after is not None and self.record.received >= fault.cut_after:
            self.hang_up()
        if fault.reset_after is not None and self.record.received >= fault.reset_after:
            self.reset()

    # The answer

    def answer(self, call: Call, fault: Fault) -> None:
        """Lets the fault act and sends the answer."""
        if fault.delay:
            time.sleep(fault.delay)
        if fault.hang_up:
            self.hang_up()
        if fault.commit is not None:
            self.server.hub.commit_fault(fault.commit)
        answer = self._faulty(call, fault) or self._routed(call)
        if fault.applied and fault.status is not None:
            answer = _status_answer(fault)
        for _ in call.stream():  # what the route did not read
            pass
        self.send(answer, fault)

    def _faulty(self, call: Call, fault: Fault) -> Answer | None:
        if fault.redirect is not None:
            target = self.server.hub.urls.get(fault.redirect, fault.redirect)
            query = f"?{call.query_text}" if call.query_text else ""
            return Answer(307, {"Location": f"{target}{call.raw_path}{query}"})
        if fault.status is not None and not fault.applied:
            return _status_answer(fault)
        return None

    def _routed(self, call: Call) -> Answer:
        try:
            return dispatch(call)
        except HubError as error:
            return error_answer(error)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            return error_answer(HubError(500, f"tests.hub failed: {error!r}"))

    def send(self, answer: Answer, fault: Fault) -> None:
        """Sends status, headers and, unless it is HEAD, the body."""
        self.record.status = answer.status
        length = max(0, answer.length - fault.shrink_by)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD" or answer.status == 304:
            return
        limit = fault.body_limit(length) if self.command != "PUT" else length
        self._send_body(answer, limit, length, fault)
        if limit < length:
            self.reset() if fault.reset_after is not None else self.hang_up()

    def _send_body(self, answer: Answer, limit: int, length: int, fault: Fault) -> None:
        if isinstance(answer.blob, FileBlob) and not fault.flip and not fault.trickle:
            self._send_file(answer.blob, answer.start, answer.start + limit)
            return
        for chunk in answer.chunks(limit):
            self._send_piece(fault.flipped(self.record.sent, chunk, length), fault.trickle)

    def _send_piece(self, chunk: bytes | memoryview, trickle: float | None) -> None:
        step = len(chunk) if not trickle else max(1, int(trickle / TRICKLES_PER_SECOND))
        for at in range(0, len(chunk), step or 1):
            piece = chunk[at : at + step]
            if trickle:
                time.sleep(len(piece) / trickle)
            self.connection.sendall(piece)
            self.record.sent += len(piece)

    def _send_file(self, blob: FileBlob, start: int, stop: int) -> None:
        with blob.path.open("rb") as file:
            while start < stop:
                count = os.sendfile(self.connection.fileno(), file.fileno(), start, min(SENDFILE_CHUNK, stop - start))
                if count == 0:
                    raise ConnectionEndedError
                start += count
                self.record.sent += count

    # The end of a connection

    def hang_up(self) -> None:
        """Ends the connection with FIN, after what was sent. Raises ConnectionEndedError."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionEndedError

    def reset(self) -> None:
        """Ends the connection with RST. Raises ConnectionEndedError."""
        time.sleep(0.05)  # what was sent arrives first: RST throws away what the other side has not read
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.forget(self.connection)
        os.close(self.connection.detach())
        raise ConnectionEndedError


def _status_answer(fault: Fault) -> Answer:
    if fault.status is None:
        raise ValueError("a fault without a status")
    return error_answer(HubError(fault.status, fault.message, fault.code, fault.headers))
