"""An HTTP proxy before an S3 server that does to requests what a test says: it sees every read and write of a run."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

WRITES = {"PUT", "POST", "DELETE"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Last(bytes):
    """What is sent before the connection ends, whatever was announced."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, whole."""

    method: str
    path: str
    data: bytes
    """Head and body."""
    server: BinaryIO

    @property
    def is_write(self) -> bool:
        return self.method in WRITES

    def forward(self) -> bytes:
        """The server's answer, whole."""
        self.server.write(self.data)
        self.server.flush()
        head = _read_head(self.server)
        status = head.split(b" ", 2)[1]
        bodiless = self.method == "HEAD" or status in (b"204", b"304")
        return head if bodiless else head + _read_body(self.server, head)

    def forward_half(self) -> None:
        """The server gets half of it, and then nothing."""
        self.server.write(self.data[: len(self.data) // 2])
        self.server.flush()


Fault = Callable[[Request], bytes | None]
"""What is answered to a request; None ends the connection without a word."""


def refusal(status: int) -> bytes:
    """An error of the store."""
    head = f"HTTP/1.1 {status} Error\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
    return head.encode() + SLOW_DOWN


@dataclass
class Proxy:
    """A running proxy."""

    server: str
    fault: Fault
    port: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of those that came."""
    clients: set[socket.socket] = field(default_factory=set)
    listening: socket.socket | None = None

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def go_away(self) -> None:
        """Refuse connections, and end those that are open."""
        if self.listening is not None:
            self.listening.shutdown(socket.SHUT_RDWR)
            self.listening.close()
        for client in list(self.clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def come_back(self) -> None:
        """Take connections, at the same address as before."""
        listening = socket.create_server(("127.0.0.1", self.port))
        self.listening, self.port = listening, listening.getsockname()[1]
        threading.Thread(target=self._serve, args=(listening,), daemon=True).start()

    def _serve(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        """All requests of one connection, which has one of its own to the server."""
        self.clients.add(client)
        host, port = self.server.removeprefix("http://").split(":")
        with suppress(OSError, EOFError), client, socket.create_connection((host, int(port))) as server:
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client.makefile("rb") as coming, server.makefile("rwb") as there:
                while True:
                    head = _read_head(coming)
                    method, path, _ = head.decode("latin-1").split(" ", 2)
                    request = Request(method=method, path=path, data=head + _read_body(coming, head), server=there)
                    self.requests.append((method, path))
                    answer = self.fault(request)
                    if answer is not None:
                        client.sendall(answer)
                    if answer is None or isinstance(answer, Last):
                        client.shutdown(socket.SHUT_RDWR)
                        break
        self.clients.discard(client)


@contextmanager
def fault_proxy(server: str, fault: Fault) -> Iterator[Proxy]:
    """A proxy before a server's endpoint."""
    proxy = Proxy(server=server, fault=fault)
    proxy.come_back()
    try:
        yield proxy
    finally:
        proxy.go_away()


def _read_head(stream: BinaryIO) -> bytes:
    lines = []
    while (line := stream.readline()) != b"\r\n":
        if not line.endswith(b"\r\n"):
            raise EOFError
        lines.append(line)
    return b"".join(lines) + b"\r\n"


def _read_body(stream: BinaryIO, head: bytes) -> bytes:
    headers = {}
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    if headers.get(b"transfer-encoding") == b"chunked":
        return b"".join(_chunks(stream))
    num_bytes = int(headers.get(b"content-length", b"0"))
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise EOFError
    return data


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """As they are on the wire."""
    while True:
        size = stream.readline()
        yield size
        yield stream.read(int(size, 16) + 2)
        if int(size, 16) == 0:
            return
