"""HTTP server of the page of `search.py --serve`: access control, size limits, timeouts.

    GET  /                     the page: page/page.html, page.css, page.js, icon.svg; ?token=... sets the cookie
    GET  /about                the index and the limits, JSON
    GET  /item/ROW             an indexed item, encoded again as JPEG or WAV
    POST /search               body: the query; JSON {"results", "warning"}; ?rerank=1: the re-ranked order
    POST /attention?row=ROW    body: the query; JSON, see `PageAnswers.attention`

A page elsewhere cannot reach the index through a user's browser: names of other hosts are refused (DNS rebinding), and
so are requests that another origin made. A connection serves one request, and each is answered or times out.
"""

import contextlib
import hmac
import io
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import socketserver
import threading
import time
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from shards.errors import UserError
from toolkit.indexing.answers import MAX_BODY, ItemMissing, PageAnswers

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
CONNECTIONS = 64  # served at once; further ones wait in the kernel's queue
BODIES = 8  # queries in memory at once
HEADER_SECONDS, BODY_SECONDS, WAIT_SECONDS, SEND_SECONDS = 10.0, 60.0, 30.0, 30.0
_DISCARDED = 4 << 20, 2.0  # bytes and seconds that a refused client may go on sending before it reads the answer
_FILES = {  # the only files that are served
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
        "media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class RequestRefused(Exception):
    """A request that is answered with an HTTP status other than 200 and one line."""

    def __init__(self, status: HTTPStatus, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class _Incoming(io.RawIOBase):
    """What a client sends, up to a deadline that slow bytes do not postpone."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection = connection
        self.set_deadline(seconds)

    def set_deadline(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class PageServer(ThreadingHTTPServer):
    """Serves the page; a bounded number of connections at a time.

    Args:
        answers: Computes the answers.
        host: Address to listen on.
        port: Port; 0: any that is free.
        token: Needed by every request; None: none is.
    """

    daemon_threads = False  # closing the server waits for the requests in progress
    request_queue_size = 256

    def __init__(self, answers: PageAnswers, host: str = LOOPBACK, port: int = 0, token: str | None = None) -> None:
        self.answers, self.token = answers, token
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        folder = resources.files("toolkit.indexing") / "page"
        self.files = {path: (media, (folder / name).read_bytes()) for path, (name, media) in _FILES.items()}
        self.bodies = threading.BoundedSemaphore(BODIES)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self._open: set[socket.socket] = set()
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Bind without looking up a name, which takes seconds where no name server answers."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, once fewer than the limit are open."""
        self._connections.acquire()
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was started
            self._open.discard(request)
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.discard(request)
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""
        logger.debug("connection of %s", client_address[0], exc_info=True)

    def server_close(self) -> None:
        """Stop listening, read no more from open connections, and wait for the requests in progress."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    def is_own_host(self, host: str) -> bool:
        """Whether a Host header names this machine: localhost, a numeric address, or, with a token, its host name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        with contextlib.suppress(ValueError):  # a numeric address cannot be rebound to another
            return bool(ipaddress.ip_address(name))
        own = socket.gethostname().lower().partition(".")[0]
        return name == "localhost" or (self.token is not None and name.partition(".")[0] == own)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: PageServer
    server_version, sys_version = "speech-image", ""

    def setup(self) -> None:
        """Read up to a deadline."""
        super().setup()
        self.rfile.close()
        self.incoming = _Incoming(self.connection, HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.incoming)

    def do_GET(self) -> None:
        """Answer with a file of the page, the facts of the index, or an item."""
        self._serve(self._get)

    def do_POST(self) -> None:
        """Answer a query."""
        self._serve(self._post)

    def _not_allowed(self) -> None:
        self._serve(self._refuse_method)

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _not_allowed

    def _refuse_method(self) -> tuple[str, bytes]:
        raise RequestRefused(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not allowed", Allow="GET, POST")

    def _serve(self, answer: Any) -> None:
        """Check the origin of the request, and send one answer."""
        try:
            self._check()
            media, content = answer()
            self._send(HTTPStatus.OK, media, content, {})
        except RequestRefused as refused:
            self._send_reason(refused.status, str(refused), refused.headers)
        except ItemMissing as error:
            self._send_reason(HTTPStatus.NOT_FOUND, str(error))
        except UserError as error:
            self._send_reason(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except TimeoutError:
            self._send_reason(HTTPStatus.REQUEST_TIMEOUT, "the request came too slowly")
        except ConnectionError:  # the client went away
            self.close_connection = True
        except Exception:
            logger.exception("%s %s failed", self.command, urlsplit(self.path).path[:100])
            self._send_reason(HTTPStatus.INTERNAL_SERVER_ERROR, "this failed: the log of search.py says why")

    def _check(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.is_own_host(hosts[0]):
            raise RequestRefused(
                HTTPStatus.FORBIDDEN, "the request names another host: open the address that was printed"
            )
        entering = self.command == "GET" and self.path.partition("?")[0] == "/"  # a link may lead here
        site, origin = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Origin")
        foreign = origin is not None and origin.partition("://")[2].lower() != hosts[0].lower()
        if foreign or (site not in ("same-origin", "none") and not entering):
            raise RequestRefused(HTTPStatus.FORBIDDEN, "the request comes from another site")
        if self.server.token:
            self._check_token(entering)

    def _check_token(self, entering: bool) -> None:
        """Exchange the token of the printed address for a cookie, which later requests need."""
        name = f"speech-image-{self.server.server_port}"
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0] if entering else ""
        expected = str(self.server.token)
        if given and hmac.compare_digest(given.encode(), expected.encode()):
            cookie = f"{name}={expected}; Path=/; HttpOnly; SameSite=Lax"
            raise RequestRefused(HTTPStatus.SEE_OTHER, "welcome", Location="/", **{"Set-Cookie": cookie})
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        stored = cookies[name].value if name in cookies else ""
        if not hmac.compare_digest(stored.encode(), expected.encode()):
            raise RequestRefused(HTTPStatus.FORBIDDEN, "a token is needed: open the address that search.py printed")

    def _get(self) -> tuple[str, bytes]:
        path = self.path.partition("?")[0]
        if path in self.server.files:
            return self.server.files[path]
        if path == "/about":
            return _json(self.server.answers.about())
        if match := re.fullmatch(r"/item/([0-9]{1,12})", path):
            return self.server.answers.item(int(match[1]))
        raise RequestRefused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self) -> tuple[str, bytes]:
        path, _, query = self.path.partition("?")
        row = re.fullmatch(r"row=([0-9]{1,12})", query)
        if path not in ("/search", "/attention") or (path == "/attention" and not row):
            raise RequestRefused(HTTPStatus.NOT_FOUND, "there is no such page")
        length = self._length()
        if not self.server.bodies.acquire(timeout=WAIT_SECONDS):
            raise RequestRefused(HTTPStatus.SERVICE_UNAVAILABLE, "busy: try again", **{"Retry-After": "5"})
        try:
            self.incoming.set_deadline(BODY_SECONDS)
            body = self.rfile.read(length)
            if len(body) < length:
                raise RequestRefused(HTTPStatus.BAD_REQUEST, f"the body ends after {len(body):,} of {length:,} bytes")
            if row and path == "/attention":
                return _json(self.server.answers.attention(body, int(row[1])))
            return _json(self.server.answers.search(body, rerank=query == "rerank=1"))
        finally:
            self.server.bodies.release()

    def _length(self) -> int:
        """Length of the body, within the limit."""
        lengths = self.headers.get_all("Content-Length", [])
        if self.headers.get("Transfer-Encoding") or len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            raise RequestRefused(HTTPStatus.LENGTH_REQUIRED, "the length of the body has to be given once")
        if int(lengths[0]) > MAX_BODY:
            raise RequestRefused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{int(lengths[0]):,} bytes, the limit is {MAX_BODY:,}: use a shorter recording or a smaller picture",
            )
        if lengths[0].strip("0") == "":
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "the body is empty")
        return int(lengths[0])

    def _send_reason(self, status: HTTPStatus, reason: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, *_json({"error": " ".join(reason.split())}), headers or {})
        if status != HTTPStatus.SEE_OTHER:
            self._discard()

    def _send(self, status: HTTPStatus, media: str, content: bytes, headers: dict[str, str]) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client went away, or reads too slowly
            self.connection.settimeout(SEND_SECONDS)
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": media, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    def _discard(self) -> None:
        """Read on for a moment: a client that still sends would lose the answer to a reset of the connection."""
        size, seconds = _DISCARDED
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.incoming.set_deadline(seconds)
            while size > 0 and (block := self.rfile.read1(1 << 16)):
                size -= len(block)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not HTTP with one line."""
        self.command = self.command or ""
        self._send_reason(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log requests at level debug."""
        logger.debug("%s: %s", self.client_address[0], (format % arguments)[:200].encode("unicode_escape").decode())


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


def serve(answers: PageAnswers, folder: Path, port: int, host: str | None = None) -> None:
    """Serve the page until interrupted.

    Args:
        answers: Computes the answers.
        folder: The index, as named by the user.
        port: Port; 0: any that is free.
        host: Address to listen on; a random token is then needed. None: 127.0.0.1, without a token.

    Raises:
        UserError: The address cannot be listened on.
    """
    token = None if host is None else secrets.token_urlsafe(24)
    try:
        server = PageServer(answers, host or LOOPBACK, port, token)
    except (OSError, OverflowError, UnicodeError) as error:
        where = f"--serve {port}" + (f" --host {host}" if host else "")
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: {reason}: pass another address or port; port 0 is any that is free") from None
    try:
        with server:
            print("\n".join(addresses(server, f"{folder} ({len(answers.searcher.index):,} items)")), flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)


def addresses(server: PageServer, what: str) -> list[str]:
    """Lines that say where the page is, from this machine and from another."""
    host, port = str(server.server_address[0]), server.server_port
    entry = f"/?token={server.token}" if server.token else "/"
    anywhere = ipaddress.ip_address(host).is_unspecified
    local = ipaddress.ip_address(host).is_loopback
    shown = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
    login = os.environ.get("SLURM_SUBMIT_HOST")
    jump = f" -J {login}" if login and login.split(".")[0] != socket.gethostname().split(".")[0] else ""
    target = LOOPBACK if anywhere else shown
    lines = [
        f"serving {what} at http://{shown}:{port}{entry} (Ctrl-C ends it)",
        f"from another machine: ssh -N -L {port}:{target}:{port}{jump} {socket.gethostname()}",
        f"and open http://localhost:{port}{entry} there",
    ]
    if not local:
        lines.append("browsers give a page the microphone on localhost and https only: use the ssh line for it")
    return lines
