"""Datasets in object stores: s3:// with If-None-Match, gs:// with if-generation-match, through fsspec.

ObjectStore has the methods of Store; `open_store` picks by the root. An object appears whole or not at all:
it is sent by one PUT or by a multipart upload that is aborted on an error, never through `fs.open(.., "wb")`,
which publishes what it has when the body raises. What a killed writer leaves of a multipart upload no reader
and no listing sees: let a lifecycle rule of the bucket (AbortIncompleteMultipartUpload) remove it.

Credentials and endpoint are those of the store's own tools: AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL;
GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST. None is ever logged.
"""

import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from shards import remote
from shards.errors import UserError
from shards.store import OPS, TEMPORARY_PREFIX, Store

_T = TypeVar("_T")
_Names = list[str]  # inside the class `list` is its method
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)")
_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_PART_BYTES = 32 << 20  # of a multipart upload; files below twice that go by one PUT
_PARTS_AT_ONCE = 4
_ATTEMPTS = 7
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 10.0  # seconds between attempts, doubled each time, with jitter
_READ_SECONDS = 60.0  # for the whole answer to one read; a trickle would keep the socket's timeout away
_BUFFER_BYTES = 1 << 20
_PAGE = 1000  # names in one answer of a listing
_WRITER = "writer"  # metadata of a created object: a random token, which tells our own success from another's


def is_url(root: str | Path) -> bool:
    """Whether a dataset's root is an object store; pathlib's `s3:/bucket`, with one slash, counts too."""
    match = _URL.fullmatch(str(root))
    return match is not None and ("://" in str(root) or match[1].lower() in _SCHEMES)


def location(root: str | Path) -> str:
    """A root that holds wherever it is read: `s3://bucket/prefix`, `gs://...`, or an absolute path.

    Raises UserError for the URL of another kind of store, or one without a bucket.
    """
    if not is_url(root):
        return str(Path(root).absolute())
    match = _URL.fullmatch(str(root))
    assert match is not None
    scheme, rest = _SCHEMES.get(match[1].lower()), match[2].strip("/")
    parts = rest.split("/")
    if scheme is None or not all(parts) or not {".", ".."}.isdisjoint(parts) or re.search(r"[?#\s]", rest):
        raise UserError(f"{root}: a dataset lies in a folder, in s3://BUCKET/PREFIX or in gs://BUCKET/PREFIX")
    return f"{scheme}://{rest}"


def open_store(root: str | Path) -> Store:
    """The store of a dataset: an ObjectStore for s3:// and gs://, else the Store of a folder.

    Raises UserError for an unknown scheme, and where the library of the store is not installed.
    """
    return ObjectStore(root) if is_url(root) else Store(root)


@dataclass(frozen=True)
class _Head:
    """What a store says of an object. digest: the MD5 kind that S3 and GCS keep, "" where it says nothing."""

    size: int
    digest: str
    writer: str
    modified: float  # seconds since 1970


class ObjectStore(Store):
    """Immutable objects under s3://bucket/prefix or gs://bucket/prefix; safe between threads, after a fork.

    Transient errors (500, 503, slow down, lost connections) are tried `attempts` times in all, with pauses
    growing from `first_wait` seconds. What remains is UserError; a missing object is FileNotFoundError.
    """

    remote = True

    def __init__(
        self,
        root: str | Path,
        attempts: int = _ATTEMPTS,
        first_wait: float = _FIRST_WAIT,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        self.root: str = location(root)
        self._scheme, _, self._prefix = self.root.partition("://")
        self._attempts, self._first_wait, self._part_bytes = attempts, first_wait, part_bytes
        remote.library(self._scheme)

    def local(self, name: str) -> Path:
        """Raises UserError: an object has no path."""
        raise UserError(f"{self.root}: this needs a dataset in a folder; copy it to a disk first")

    def put(self, name: str, data: bytes | Path) -> str:
        """Write or replace an object whole, and hold what the store has to its size and MD5. Its sha256."""
        path = self._path(name)
        sent = _measure(data, self._part_bytes)
        OPS.before("put")
        self._call(lambda fs: self._put_once(fs, path, data, sent))
        OPS.before("answer")
        return sent.sha256

    def _put_once(self, fs: Any, path: str, data: bytes | Path, sent: "_Sent") -> None:
        options: dict[str, Any] = {"chunksize": self._part_bytes}
        options |= {"max_concurrency": _PARTS_AT_ONCE} if self._scheme == "s3" else {"consistency": "md5"}
        if isinstance(data, bytes):
            fs.pipe_file(path, data, **options)
        else:
            fs.put_file(str(data), path, **options)
        head = self._head(fs, path)
        if head.size != sent.size or (head.digest and head.digest not in sent.digests):
            raise remote.DamagedError("the store holds something else than what was sent")

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none of that name: True for exactly one of any number of callers.

        An answer may be lost and the request repeated: the object's writer token tells whose it is.
        """
        path, token = self._path(name), os.urandom(16).hex()
        metadata: dict[str, Any] = {_WRITER: token}
        key = "Metadata" if self._scheme == "s3" else "metadata"

        def once(fs: Any) -> bool:
            try:
                fs.pipe_file(path, data, mode="create", **{key: metadata})
            except Exception as error:
                if not isinstance(error, FileExistsError) and remote.status(error) != 412:
                    raise
                return self._head(fs, path).writer == token
            return True

        OPS.before("create")
        created = self._call(once)
        OPS.before("answer")
        return created

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of an object, or `size` of them from `offset` (fewer at its end): one ranged request."""
        path = self._path(name)
        if size is not None and size <= 0:
            return b""
        end = None if size is None else offset + size

        def once(fs: Any) -> bytes:
            try:
                return bytes(fs.cat_file(path, start=offset, end=end, timeout=_READ_SECONDS))
            except FileNotFoundError:
                raise
            except Exception as error:
                if remote.status(error) != 416:  # the range begins at the end or behind it
                    raise
                return b""

        return self._call(once)

    def open(self, name: str) -> io.BufferedReader:
        """A seekable file that reads by ranges, a buffer at a time. Raises FileNotFoundError at once."""
        raw = _ObjectFile(self, name, self.size(name))
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of an object."""
        path = self._path(name)
        return self._call(lambda fs: self._head(fs, path)).size

    def list(self, prefix: str = "") -> _Names:
        """Sorted names of all objects below a folder."""
        top = self._path(prefix) if prefix else self._prefix
        found = self._call(lambda fs: fs.find(top))
        names = (name.removeprefix(f"{self._prefix}/") for name in found)
        return sorted(n for n in names if not n.rpartition("/")[2].startswith(TEMPORARY_PREFIX) and n)

    def each(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every object below a folder, page by page; a marker of a folder is none."""
        top = f"{self._prefix}/{prefix}".strip("/")
        if self._scheme == "s3":
            found = self._pages(*top.partition("/")[::2])
        else:
            infos = self._call(lambda fs: fs.find(top, detail=True))
            found = ((name, int(info["size"])) for name, info in infos.items() if name != top)
        for name, size in found:
            if not name.endswith("/"):
                yield name.removeprefix(f"{self._prefix}/"), size

    def _pages(self, bucket: str, key: str) -> Iterator[tuple[str, int]]:
        more: dict[str, Any] | None = {}
        while more is not None:
            asked = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", "MaxKeys": _PAGE} | more
            page = self._call(partial(_list_page, asked=asked))
            yield from ((f"{bucket}/{found['Key']}", found["Size"]) for found in page.get("Contents", ()))
            more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None

    def state(self, name: str) -> tuple[int, str, float]:
        """Size, digest ("" where the store tells none) and time: they change when an object is replaced."""
        path = self._path(name)
        head = self._call(lambda fs: self._head(fs, path))
        return head.size, head.digest, head.modified

    def temporaries(self) -> _Names:
        """None: an object appears under its name, whole, or not at all."""
        return []

    def is_empty(self) -> bool:
        """Whether nothing lies under the root."""

        def once(fs: Any) -> bool:
            try:
                return not fs.ls(self._prefix, detail=False)
            except FileNotFoundError as error:
                if remote.code(error) == "NoSuchBucket":
                    raise
                return True

        return self._call(once)

    def delete(self, name: str) -> None:
        """Remove an object; no error where it is gone already."""
        path = self._path(name)

        def once(fs: Any) -> None:
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                return

        OPS.before("delete")
        self._call(once)

    def age_seconds(self, name: str) -> float:
        """Seconds since an object was written: the store's clock against this machine's."""
        path = self._path(name)
        return time.time() - self._call(lambda fs: self._head(fs, path)).modified

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ValueError(f"not a name inside a store: {name!r}")
        return "/".join((self._prefix, *parts))

    def _head(self, fs: Any, path: str) -> _Head:
        if self._scheme == "s3":
            bucket, _, key = path.partition("/")
            found = fs.call_s3("head_object", Bucket=bucket, Key=key)
            encrypted = found.get("ServerSideEncryption", "AES256") != "AES256"
            opaque = encrypted or "SSECustomerAlgorithm" in found  # then the ETag is no MD5
            etag = "" if opaque else found["ETag"].strip('"')
            writer = found.get("Metadata", {}).get(_WRITER, "")
            return _Head(found["ContentLength"], etag, writer, found["LastModified"].timestamp())
        found = fs.info(path)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        writer = (found.get("metadata") or {}).get(_WRITER, "")
        return _Head(
            int(found["size"]), "", writer, found["mtime"].timestamp()
        )  # gcsfs has held it to its MD5

    def _call(self, function: Callable[[Any], _T]) -> _T:
        """function(file system), repeated after transient errors; what remains as a clear error."""
        fs = remote.filesystem(self._scheme)
        attempts = self._attempts if self._scheme == "s3" else 1  # gcsfs repeats by itself
        began = time.monotonic()
        for attempt in range(attempts):
            try:
                return function(fs)
            except UserError:
                raise
            except Exception as error:
                transient = remote.is_transient(error)
                if not transient or attempt == attempts - 1:
                    tries = f"{attempt + 1} tries in {time.monotonic() - began:.0f} s"
                    clear = self._clear(error, transient, f"{remote.answer(error)}, {tries}")
                    if clear is None:
                        raise
                    raise clear from error
            pause = min(_LONGEST_WAIT, self._first_wait * 2**attempt)
            time.sleep(pause * random.uniform(0.5, 1.0))  # jitter: many workers are slowed down at once
        raise AssertionError("not reached")

    def _clear(self, error: Exception, transient: bool, answer: str) -> Exception | None:
        """The error to raise instead; None: the error itself. answer: the last one, and how often asked."""
        if remote.code(error) == "NoSuchBucket":
            return UserError(f"{self.root}: there is no such bucket: create it, or correct the URL")
        if isinstance(error, FileNotFoundError):
            return None
        classes = {c.__name__ for c in type(error).__mro__}
        forbidden = remote.status(error) in (401, 403) or str(error).startswith("Forbidden")
        if isinstance(error, PermissionError) or forbidden or classes & remote.NO_ACCESS_CLASSES:
            return UserError(
                f"{self.root}: access denied: check the credentials, and that they may list, read, write and "
                "delete objects there"
            )
        if isinstance(error, remote.DamagedError):
            return UserError(f"{self.root}: the store did not keep what was sent: check it, then run again")
        if transient:
            return UserError(
                f"{self.root}: the store does not answer or is overloaded ({answer}): check the endpoint and "
                "the network, then run again; nothing half-written is left"
            )
        return None


class _ObjectFile(io.RawIOBase):
    """Ranged reads as a file."""

    def __init__(self, store: ObjectStore, name: str, size: int) -> None:
        super().__init__()
        self._store, self._name, self._size = store, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a negative position")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = self._store.read(self._name, self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _list_page(fs: Any, asked: dict[str, Any]) -> dict[str, Any]:
    page: dict[str, Any] = fs.call_s3("list_objects_v2", **asked)
    return page


@dataclass(frozen=True)
class _Sent:
    """What is sent. digests: the ETags that S3 may give it, in one PUT or in parts."""

    size: int
    sha256: str
    digests: frozenset[str]


def _measure(data: bytes | Path, part_bytes: int) -> _Sent:
    sha256, whole = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    parts = []
    size = 0
    for part in _parts(data, part_bytes):
        size += len(part)
        sha256.update(part)
        whole.update(part)
        parts.append(hashlib.md5(part, usedforsecurity=False).digest())
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    digests = frozenset({whole.hexdigest(), f"{joined}-{len(parts)}"})
    return _Sent(size, sha256.hexdigest(), digests)


def _parts(data: bytes | Path, part_bytes: int) -> Iterator[bytes]:
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        while part := file.read(part_bytes):
            yield part
