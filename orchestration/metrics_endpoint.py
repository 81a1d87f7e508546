"""The HTTP endpoint of a job's metrics, and how Prometheus finds it: entries of file-based service discovery.

An entry stands in the job's output or run folder (metrics-targets.json), and in the folder that
MEDSWAV_METRICS_TARGETS names, so that one pattern in prometheus.yml finds all jobs. It goes when the job
ends. After a kill it stays until the job is started again: the target is down, as the alert looks for.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from orchestration.metrics import Metrics
from shards.errors import UserError
from shards.store import clear_errors

TARGETS_FILE = "metrics-targets.json"
TARGETS_VARIABLE = "MEDSWAV_METRICS_TARGETS"
LAST_SCRAPE_SECONDS = 65.0  # Prometheus's default interval is a minute


@contextlib.contextmanager
def endpoint(
    metrics: Metrics,
    folder: Path | None,
    job: str,
    port: int = 0,
    host: str = "127.0.0.1",
    name: str = "",
) -> Iterator[str]:
    """Serve /metrics while the body runs; yields the URL. `port` 0: a free one.

    folder: of the job's output, None for one in a bucket; name: what the job writes to, as text. When the
    body fails, medswav_job_failed is 1, and a job that is being scraped waits for one more scrape. Raises
    UserError when the port is taken.
    """
    scrapes = _Scrapes(make_wsgi_app(metrics.registry))
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        served = _Server6 if family == socket.AF_INET6 else _Server
        server = make_server(host, port, scrapes, served, _Quiet)
    except OSError:
        raise UserError(
            f"port {port} on {host} is not free for the metrics: give another --metrics-port, or 0 for any"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    reachable = socket.gethostname() if host in ("0.0.0.0", "::") else host
    target = (
        f"[{reachable}]:{server.server_port}" if ":" in reachable else f"{reachable}:{server.server_port}"
    )
    entries = target_entries(folder, job, name)
    try:
        for entry in entries:
            _write_targets(entry, target, job)
        try:
            yield f"http://{target}/metrics"
        except Exception:  # whatever ended the job: it goes on its way below
            metrics.set("medswav_job_failed", 1)
            scrapes.wait_for_one(LAST_SCRAPE_SECONDS)
            raise
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
        for entry in entries:
            entry.unlink(missing_ok=True)


def target_entries(folder: Path | None, job: str, name: str = "") -> list[Path]:
    """Where the entries of a job stand: the same for each attempt at it."""
    own = [folder / TARGETS_FILE] if folder is not None else []
    common = os.environ.get(TARGETS_VARIABLE)
    if not common:
        return own
    key = hashlib.sha256(str(folder.absolute() if folder is not None else name).encode()).hexdigest()[:16]
    return [*own, Path(common) / f"medswav-{job}-{key}.json"]


def forget_targets(folder: Path | None, job: str, name: str = "") -> None:
    """Remove what a killed job has left, where nothing is left to do that would write it anew."""
    for entry in target_entries(folder, job, name):
        with contextlib.suppress(OSError):
            entry.unlink(missing_ok=True)


class _Scrapes:
    """A WSGI application that knows whether it is asked."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._changed = threading.Condition()
        self._count, self._last = 0, 0.0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = list(self._application(environ, start_response))
        with self._changed:
            self._count, self._last = self._count + 1, time.monotonic()
            self._changed.notify_all()
        return body

    def wait_for_one(self, seconds: float) -> None:
        """Until one more scrape; not at all when there was none in the last `seconds`."""
        with self._changed:
            before = self._count
            if before and time.monotonic() - self._last < seconds:
                self._changed.wait_for(lambda: self._count > before, seconds)


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several at a time, as prometheus_client's own does."""

    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    timeout = 30  # of a client that says nothing

    def log_message(self, *arguments: Any) -> None:
        """Not on the user's terminal."""


def _write_targets(entry: Path, target: str, job: str) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    with clear_errors(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([{"targets": [target], "labels": {"job": "medswav", "task": job}}]))
        temporary.chmod(0o644)  # Prometheus is another user
        temporary.replace(entry)
