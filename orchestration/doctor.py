"""`medswav doctor`: is this machine able to do the work? A line a check, with the fix where it fails."""

import errno
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ingest.dicom.syntaxes import DECODERS, SUPPORTED, check_decoders, undecodable
from shards.errors import UserError

MINIMUM_SHM_BYTES = 1 << 30
# Module, package to install, what it is for: beside the decoders of DICOM.
OTHERS = (
    ("pydicom", "pydicom", "DICOM"),
    ("nibabel", "nibabel", "NIfTI"),
)


@dataclass(frozen=True)
class Check:
    """`level`: ok, warning (works, but slowly or not everything), failed."""

    name: str
    level: str
    detail: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def run_checks(folder: Path | None = None) -> list[Check]:
    """All checks; `folder` is where datasets or runs are to be written (default: the working directory)."""
    target = folder or Path.cwd()
    return [
        _python(),
        *[_module(*module) for module in (*OTHERS, *DECODERS)],
        _syntaxes(),
        *check_folder(target),
        _shared_memory(Path("/dev/shm")),
        _ports(),
        _torch(),
        _ray(),
        _key(),
    ]


def _python() -> Check:
    text = f"{sys.version_info.major}.{sys.version_info.minor}, {os.cpu_count()} CPUs"
    return Check("python", "ok" if sys.version_info >= (3, 11) else "failed", text)


def _module(module: str, package: str, purpose: str) -> Check:
    try:
        import_module(module)
    except ImportError:
        return Check(package, "failed", f"{purpose}: not installed; pip install {package}")
    return Check(package, "ok", f"{_version(package)} ({purpose})")


def _syntaxes() -> Check:
    """What ingest checks when it starts, and more: that pydicom's plugins for the packages load."""
    try:
        check_decoders()
        broken = undecodable()
    except (UserError, ImportError) as error:
        return Check("transfer syntaxes", "failed", str(error))
    if broken:
        text = f"no working decoder for {', '.join(broken)}: reinstall the packages above"
        return Check("transfer syntaxes", "failed", text)
    return Check("transfer syntaxes", "ok", f"all {len(SUPPORTED)} decode")


def check_folder(folder: Path) -> list[Check]:
    """What commits need of a file system: exclusive hard links, atomic rename, fsync of folders."""
    if not folder.is_dir():
        return [Check("folder", "failed", f"{folder} does not exist: create it")]
    free = shutil.disk_usage(folder).free
    space = Check("free space", "ok" if free > 5e9 else "warning", f"{free / 1e9:.1f} GB in {folder}")
    try:
        with tempfile.TemporaryDirectory(prefix=".medswav-doctor-", dir=folder) as scratch:
            semantics = [
                _attempt(name, check, Path(scratch))
                for name, check in (("link", _link), ("rename", _rename), ("fsync", _fsync))
            ]
    except OSError as error:
        return [space, Check("write", "failed", f"cannot write to {folder}: {error.strerror}")]
    return [space, *semantics]


def _attempt(name: str, check: Callable[[Path], str | None], scratch: Path) -> Check:
    try:
        problem = check(scratch)
    except OSError as error:
        problem = f"{errno.errorcode.get(error.errno or 0, 'error')}"
    if problem is None:
        return Check(f"file system: {name}", "ok", "as the commit protocol needs it")
    return Check(f"file system: {name}", "failed", f"{problem}: use a folder on another file system")


def _link(scratch: Path) -> str | None:
    first, second = scratch / "first", scratch / "second"
    first.write_bytes(b"1")
    second.hardlink_to(first)
    try:
        second.hardlink_to(first)
    except FileExistsError:
        return None
    return "a hard link replaces an existing file"


def _rename(scratch: Path) -> str | None:
    new, old = scratch / "new", scratch / "old"
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    new.replace(old)
    return None if old.read_bytes() == b"new" and not new.exists() else "rename does not replace"


def _fsync(scratch: Path) -> str | None:
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check(str(path), "warning", "not there: Ray then keeps its object store on disk, slowly")
    free = shutil.disk_usage(path).free
    if free < MINIMUM_SHM_BYTES:
        text = f"{free / 1e6:.0f} MB free: start the container with a larger one (--shm-size=2g)"
        return Check(str(path), "warning", text)
    return Check(str(path), "ok", f"{free / 1e9:.1f} GB free")


def _ports() -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
            with socket.create_connection(probe.getsockname(), timeout=2):
                pass
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        text = f"{error.strerror or error}: Ray and the ranks talk over TCP; the host name must resolve"
        return Check("ports", "failed", text)
    return Check("ports", "ok", "local TCP works, the host name resolves")


def _torch() -> Check:
    try:
        import torch
    except ImportError:
        return Check("torch", "failed", "not installed; pip install torch")
    devices = torch.cuda.device_count()
    what = f"{devices} GPUs ({torch.cuda.get_device_name(0)})" if devices else "no GPU: training runs on CPUs"
    level = "ok" if torch.distributed.is_available() else "failed"
    return Check("torch", level, f"{torch.__version__}, {what}")


def _ray() -> Check:
    from orchestration.cluster import prepare_environment, wanted_address

    prepare_environment()
    try:
        import ray
    except ImportError:
        return Check("ray", "failed", "not installed; pip install 'ray[default,train]'")
    address = wanted_address(None)
    return Check("ray", "ok", f"{ray.__version__}, " + (f"RAY_ADDRESS={address}" if address else "local"))


def _key() -> Check:
    from shards.ids import KEY_VARIABLE

    if os.environ.get(KEY_VARIABLE):
        return Check("key", "ok", f"{KEY_VARIABLE} is set")
    text = f"{KEY_VARIABLE} is not set: give ingest a --key FILE (`ingest key FILE` creates one)"
    return Check("key", "ok", text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"
