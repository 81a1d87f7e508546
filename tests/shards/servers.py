"""S3 and GCS servers on this machine, behind a proxy that fails requests as networks and stores do."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "datasets"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def choose(monkeypatch, url: str) -> None:
    """S3 clients of this test talk to the server at `url`."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "expect"})


def _nothing(method: str, path: str) -> str | None:
    return None


def first(number: int, action: str, matching: Callable[[str, str], bool] = lambda m, p: True):
    """A rule: `action` for the first `number` requests that match."""
    left = [number]

    def rule(method: str, path: str) -> str | None:
        if not matching(method, path) or left[0] == 0:
            return None
        left[0] -= 1
        return action

    return rule


@dataclass
class Proxy:
    """rule(method, path) -> a status to answer without forwarding ("503"); "drop": hang up before, "lose":
    after the server has done it, "hold": when let_go is set; "damage": change a byte of the body; None: pass
    on.

    Writes pass one at a time: moto looks for an object and writes it in two steps, S3 in one.
    """

    host: str
    port: int
    rule: Callable[[str, str], str | None] = _nothing
    requests: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str, str, bytes, http.client.HTTPConnection], int | None] = lambda m, p, b, c: None
    url: str = ""

    def __post_init__(self) -> None:
        self._writes = threading.Lock()
        self.let_go = threading.Event()

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            status = self.before(method, path, body, connection)
            if status is not None:
                return status, [("Content-Type", "application/json")], b"{}"
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        method, path = handler.command, handler.path
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self.requests.append((method, path))
        action = self.rule(method, path)
        if action == "hold":  # no answer until the test lets go
            self.let_go.wait(20)
        if action in ("drop", "hold"):
            handler.close_connection = True
            return
        if action is not None and action.isdigit():
            code = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}.get(action, "Conflict")
            xml = f"<Error><Code>{code}</Code><Message>asked for by the test</Message></Error>".encode()
            _reply(handler, int(action), [("Content-Type", "application/xml")], xml)
            return
        if action == "damage":
            body = bytes([body[0] ^ 1]) + body[1:]
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
        if method in ("PUT", "POST", "DELETE"):
            with self._writes:
                reply = self.forward(method, path, headers, body)
        else:
            reply = self.forward(method, path, headers, body)
        if action == "lose":
            handler.close_connection = True
            return
        _reply(handler, *reply)


def _reply(handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    handler.send_response_only(status)
    length = str(len(body))
    for name, value in headers:
        if name.lower() == "content-length":
            length = value if handler.command == "HEAD" else length
        elif name.lower() not in _HOP:
            handler.send_header(name, value)
    handler.send_header("Content-Length", length)
    handler.end_headers()
    if handler.command != "HEAD":
        with suppress(BrokenPipeError):  # a client that has seen the status may hang up
            handler.wfile.write(body)


@contextmanager
def proxied(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy(host, port)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            proxy.answer(self)

        do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def moto() -> Iterator[tuple[Proxy, "boto3.client"]]:
    """moto's S3 server with an empty bucket; the proxy before it and a client that goes past the proxy."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        with proxied(host, port) as proxy:
            yield proxy, client
    finally:
        server.stop()


@contextmanager
def gcs() -> Iterator[Proxy]:
    """gcp-storage-emulator with an empty bucket.

    It knows no preconditions: the proxy answers 412 to `ifGenerationMatch=0` where the object is there, as
    GCS documents it. What is tested is this side of the wire.
    """
    from urllib.parse import parse_qs, quote, urlsplit

    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        host, port = server._api._httpd.server_address[:2]
        with proxied(host, port) as proxy:

            def precondition(method: str, path: str, body: bytes, connection) -> int | None:
                query = parse_qs(urlsplit(path).query)
                if method != "POST" or query.get("ifGenerationMatch") != ["0"]:
                    return None
                name = json.loads(body[body.index(b"{") : body.index(b"\n--==0==")])["name"]
                connection.request("GET", f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")
                answer = connection.getresponse()
                answer.read()
                return 412 if answer.status == 200 else None

            proxy.before = precondition
            yield proxy
    finally:
        server.stop()
