"""A Ray for the command: its own small local one, or the running one that the user names.

A local Ray lives in a folder of its own (session, sockets, token) which goes when the command ends; what a
killed command left behind goes at the next start. Nothing is written to the home directory, no dashboard is
started, nothing is reported to anybody.
"""

import atexit
import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shards.errors import UserError

FOLDER_PREFIX = "medswav-"
OBJECT_STORE_BYTES = 300 * 2**20
# One thread a process: the parallelism is in the number of workers, and threads on top only contend.
THREAD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
}
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # ranks keep the working directory: relative paths stay valid
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class JobFailedError(Exception):
    """A job came to nothing, through no setting of the user's; the text is one line. Exit code 1."""

    exit_code = 1


@dataclass(frozen=True)
class Cluster:
    """`cpus`: logical CPUs of the whole cluster. `folder`: of the local Ray that was started for this
    command, None on a running one; what is below goes with it, also after a kill."""

    cpus: int
    address: str
    folder: Path | None

    @property
    def local(self) -> bool:
        return self.folder is not None


def prepare_environment() -> None:
    """What Ray reads when it is imported. Call before the first `import ray`; a user's own values win."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def use_named_token() -> None:
    """For a running cluster: a token that the user names is meant to be used. Before the first `import ray`.

    Not for a local Ray, for which ray.init switches token authentication on itself.
    """
    if "RAY_AUTH_TOKEN_PATH" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def wanted_address(address: str | None) -> str | None:
    """The cluster to use: the option, else RAY_ADDRESS (as in `ray job submit`), else None: start one."""
    chosen = address or os.environ.get("RAY_ADDRESS") or None
    return None if chosen == "local" else chosen


def runtime_env() -> dict[str, Any]:
    """Every worker of ours: pinned thread counts. The packages are installed, so nothing is shipped."""
    return {"env_vars": dict(THREAD_ENV)}


def pin_threads() -> None:
    """OpenCV reads no environment in a process that already runs: pin it by call. Call in every worker."""
    import cv2

    cv2.setNumThreads(1)


@contextlib.contextmanager
def connected(
    address: str | None = None,
    cpus: int = 4,
    gpus: int | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    verbose: bool = False,
) -> Iterator[Cluster]:
    """Run the body with Ray initialised. `cpus` and the store size count for a local Ray only.

    Where this process is connected already, that connection is used and left open. Raises UserError when
    the named cluster cannot be reached.
    """
    target = wanted_address(address)
    local = target is None
    if local:
        _own_token()
        # A node that is about to be taken away is a thing of clouds: here it is a process for nothing.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    else:
        use_named_token()
    prepare_environment()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    import ray

    if ray.is_initialized():
        yield _describe(None)
        return
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "runtime_env": runtime_env(),
        "namespace": "medswav",
    }
    try:
        if target is None:
            _start(cpus, gpus, object_store_bytes, options)
        else:
            _connect(target, options)
        _restore(handlers)  # ray.init puts its own SIGTERM handler; the command's has to stay
        yield _describe(process_folder() if local else None)
    finally:
        ray.shutdown()
        _restore(handlers)
        if local:
            for session in process_folder().glob("session_*"):
                shutil.rmtree(session, ignore_errors=True)


def _describe(folder: Path | None) -> Cluster:
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    return Cluster(cpus, ray.get_runtime_context().gcs_address, folder)


def _start(cpus: int, gpus: int | None, store: int, options: dict[str, Any]) -> None:
    """Raises JobFailedError: Ray gives itself 30 s, which is too little on a machine that is overloaded."""
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=store,
            include_dashboard=False,
            _temp_dir=str(process_folder()),
            **options,
        )
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise JobFailedError(
            "the local Ray did not start within its 30 s: the machine is overloaded, or has no memory left; "
            "the same command continues"
        ) from None


def _connect(address: str, options: dict[str, Any]) -> None:
    import ray

    if address.startswith(("http://", "https://", "ray://")):
        raise UserError(
            f"--address {address} is no cluster address: give host:port of the head node's GCS "
            "(`ray start` prints it), or use `medswav submit --address http://...`"
        )
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        kind = type(error).__name__
        hint = (
            "set RAY_AUTH_TOKEN_PATH to the cluster's token file"
            if "Auth" in kind
            else "check that it runs (`ray status`) and that the token (RAY_AUTH_TOKEN_PATH) is the cluster's"
        )
        raise UserError(f"no Ray cluster answers at {address} ({kind}): {hint}") from None


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread: then Ray has not changed them either
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _temporary_root() -> Path:
    """A short folder: the path of a Unix socket below it has to stay under 107 bytes."""
    root = tempfile.gettempdir()
    return Path(root if len(root) <= 24 else "/tmp")


@functools.cache
def process_folder() -> Path:
    """A folder of this process's own, for a local Ray (session, token) or a worker's scratch.

    Removed when the process ends; after a kill, by the next one of ours on this machine.
    """
    root = _temporary_root()
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=root))
    (folder / "host").write_text(socket.gethostname())
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has the same exit handlers
        shutil.rmtree(folder, ignore_errors=True)


def _own_token() -> None:
    """A token for the local Ray, unless the user names one: else Ray would write one to the home directory.

    One a process: Ray reads it once and keeps it.
    """
    if "RAY_AUTH_TOKEN_PATH" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        return
    token = process_folder() / "token"
    with os.fdopen(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _sweep(root: Path) -> None:
    """Remove our folders whose process is no more. Containers may share /tmp, but not process ids: those
    of another host name are left alone."""
    for folder in root.glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            same = (folder / "host").read_text() == socket.gethostname()
            if same and pid.isdigit() and folder.stat().st_uid == os.getuid() and not _alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class StopFlag:
    """True after the first SIGTERM or SIGINT; a second one ends the process at once with 130.

    Use as a context manager in the main thread; outside of it the flag is never set.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raising = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopFlag":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        _restore(self._before)

    def __bool__(self) -> bool:
        return self.requested

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the first signal raises KeyboardInterrupt: of long steps that a kill does not harm."""
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(130)
        self.requested = True
        outer = getattr(self._before.get(signal.Signals(number)), "__self__", None)
        if isinstance(outer, StopFlag):  # of a loop around this command (orchestration.watch)
            outer.requested = True
        if self._raising:
            raise KeyboardInterrupt
