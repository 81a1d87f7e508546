"""What commits and checkpoints need of a file system, tried in the folder itself; nothing is left there."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

SPACE_BYTES, LEAST_SPACE_BYTES = 5e9, 1e8
INODES, LEAST_INODES = 100_000, 1_000
CLOCK_SECONDS = 2.0  # between this machine and the file server
_OTHER = "use a folder on another file system (local, NFS from version 3, Lustre)"


@dataclass(frozen=True)
class Check:
    """`level`: ok, warning (works, but slowly or not everything), failed. fix: what to do, where it is not
    ok."""

    name: str
    level: str
    detail: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def check_folder(folder: Path) -> list[Check]:
    """Hard links and files that exclude, rename, fsync of folders, close-to-open; clock, space, inodes."""
    if not folder.is_dir():
        return [Check("folder", "failed", f"{folder} does not exist", "create it, or name another")]
    found = [space(folder, shutil.disk_usage(folder).free), inodes(folder, os.statvfs(folder))]
    try:
        with tempfile.TemporaryDirectory(prefix=".medswav-doctor-", dir=folder) as scratch:
            tried = [_attempt(name, check, Path(scratch)) for name, check in _SEMANTICS]
            ahead = _clock(Path(scratch))
    except OSError as error:
        fix = "give the user of the job the right to write there (chmod, chown), or name another folder"
        return [*found, Check("write", "failed", f"cannot write to {folder}: {error.strerror}", fix)]
    return [*found, *tried, clock(ahead)]


def space(folder: Path, free: float) -> Check:
    text = f"{free / 1e9:.1f} GB in {folder}"
    level = "failed" if free < LEAST_SPACE_BYTES else "warning" if free < SPACE_BYTES else "ok"
    fix = "free some, or use a larger disk: `medswav capacity` says how much a run takes"
    return Check("free space", level, text, "" if level == "ok" else fix)


def inodes(folder: Path, found: os.statvfs_result) -> Check:
    if found.f_files == 0:
        return Check("inodes", "ok", f"{folder} does not count them")
    free = found.f_favail
    level = "failed" if free < LEAST_INODES else "warning" if free < INODES else "ok"
    fix = "remove small files, or make the file system with more inodes (mkfs -N, quota)"
    return Check("inodes", level, f"{free:,} free in {folder}", "" if level == "ok" else fix)


def clock(ahead_seconds: float) -> Check:
    """ahead_seconds: of the file server before this machine."""
    text = f"the file server is {abs(ahead_seconds):.1f} s {'ahead' if ahead_seconds > 0 else 'behind'}"
    if abs(ahead_seconds) <= CLOCK_SECONDS:
        return Check("clock", "ok", text)
    fix = "let chrony or ntpd set the clocks of both: the age of files decides what is stale or has settled"
    return Check("clock", "warning", text, fix)


def _clock(scratch: Path) -> float:
    """Seconds that the file server is ahead of this machine."""
    probe = scratch / "clock"
    before = time.time()
    probe.write_bytes(b"1")
    server, after = probe.stat().st_mtime, time.time()
    return server - before if server < before else max(0.0, server - after)


def _attempt(name: str, check: Callable[[Path], str | None], scratch: Path) -> Check:
    try:
        problem = check(scratch)
    except OSError as error:
        problem = f"{errno.errorcode.get(error.errno or 0, 'error')}"
    if problem is None:
        return Check(f"file system: {name}", "ok", "as the commit protocol needs it")
    return Check(f"file system: {name}", "failed", problem, _OTHER)


def _link(scratch: Path) -> str | None:
    first, second = scratch / "first", scratch / "second"
    first.write_bytes(b"1")
    second.hardlink_to(first)
    try:
        second.hardlink_to(first)
    except FileExistsError:
        return None
    return "a hard link replaces an existing file"


def _create(scratch: Path) -> str | None:
    path = scratch / "exclusive"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return None
    return "a file that is there can be created again"


def _rename(scratch: Path) -> str | None:
    new, old = scratch / "new", scratch / "old"
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    new.replace(old)
    if old.read_bytes() != b"new" or new.exists():
        return "rename does not replace"
    folder, target = scratch / "folder", scratch / "target"
    folder.mkdir()
    (folder / "file").write_bytes(b"1")
    folder.rename(target)
    return None if (target / "file").is_file() and not folder.exists() else "a folder cannot be renamed"


def _fsync(scratch: Path) -> str | None:
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _close_to_open(scratch: Path) -> str | None:
    """Another process reads what was written, closed, and put in the place of a file that it has seen."""
    path, ready = scratch / "shared", scratch / "seen"
    path.write_bytes(b"before")
    code = (
        "import sys, time, pathlib\n"
        "shared, seen, new = map(pathlib.Path, sys.argv[1:])\n"
        "assert shared.read_bytes() == b'before'\n"
        "seen.touch()\n"
        "end = time.monotonic() + 10\n"
        "while not new.exists() and time.monotonic() < end: time.sleep(.005)\n"
        "sys.exit(0 if shared.read_bytes() == b'after' else 9)\n"
    )
    new = scratch / "written"
    reader = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(path), str(ready), str(new)], stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 10
        while not ready.exists() and reader.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        beside = scratch / "shared.new"
        beside.write_bytes(b"after")
        beside.replace(path)
        new.touch()
        return None if reader.wait(20) == 0 else "another process does not see what was written and closed"
    except subprocess.TimeoutExpired:
        return "another process that reads hangs"
    finally:
        reader.kill()
        reader.wait()


_SEMANTICS: tuple[tuple[str, Callable[[Path], str | None]], ...] = (
    ("link", _link),
    ("create", _create),
    ("rename", _rename),
    ("fsync", _fsync),
    ("close-to-open", _close_to_open),
)
