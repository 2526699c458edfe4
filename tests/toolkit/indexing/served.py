"""A served index, and requests as they go over the wire."""

import contextlib
import json
import os
import socket
import threading

from toolkit.indexing.answers import PageAnswers
from toolkit.indexing.encoder import Encoder
from toolkit.indexing.search import Searcher
from toolkit.indexing.serve import PageServer
from toolkit.indexing.store import Index


@contextlib.contextmanager
def serving(index, model, **options):
    """A server of an index in this process."""
    searcher = Searcher(Index.open(index), Encoder.load(model, "cpu"), "sum", workers=2)
    server = PageServer(PageAnswers(searcher, top=5, rerank=3), **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(server):
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=60)


def receive(connection):
    """All bytes until the server closes."""
    parts = []
    while block := connection.recv(1 << 16):
        parts.append(block)
    return b"".join(parts)


def parsed(answer):
    """Status, headers and body of one answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert len(body) == int(headers["Content-Length"]), answer[:300]
    status = int(first.split()[1])
    is_json = headers["Content-Type"] == "application/json"
    return status, headers, json.loads(body) if is_json else body


def raw(server, request):
    with connect(server) as connection:
        connection.sendall(request)
        return parsed(receive(connection))


def ask(server, target, body=None, method=None, **headers):
    """Send one request; underscores in the names of headers stand for hyphens."""
    method = method or ("GET" if body is None else "POST")
    values = {"Host": f"127.0.0.1:{server.server_port}"}
    values |= {} if body is None else {"Content-Length": str(len(body))}
    values |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in values.items())
    return raw(server, f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + (body or b""))


def open_files():
    return len(os.listdir("/proc/self/fd"))
