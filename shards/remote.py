"""The file systems of fsspec behind ObjectStore, and what their errors mean."""

import importlib
import os
from collections.abc import Iterator
from typing import Any, cast

from shards.errors import UserError

_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}  # scheme -> module, extra of this package
_ENVIRONMENT = ("AWS_", "FSSPEC_", "GOOGLE_", "STORAGE_EMULATOR", "GCSFS_")
_TRANSIENT_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})  # 409: two conditional writes at once
_TRANSIENT_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown"})
_TRANSIENT_CLASSES = frozenset(  # of botocore, aiohttp, requests and gcsfs, which need not be installed
    {
        "HTTPClientError",
        "ConnectionError",
        "IncompleteReadError",
        "ResponseParserError",
        "ClientPayloadError",
        "ClientConnectionError",
        "ChecksumError",
    }
)
NO_ACCESS_CLASSES = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError"}
)


class DamagedError(OSError):
    """The store holds something else than what was sent."""


_filesystems: dict[str, tuple[tuple[Any, ...], Any]] = {}


def filesystem(scheme: str) -> Any:
    """The fsspec file system of this process, made again after a fork or a change of the environment."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT)))
    key = (os.getpid(), settings)
    known = _filesystems.get(scheme)
    if known is None or known[0] != key:
        known = _filesystems[scheme] = (key, _make_filesystem(scheme))
    return known[1]


def _make_filesystem(scheme: str) -> Any:
    module = library(scheme)
    # No caches: another writer's objects are seen at once. One layer of retries: ours, which is bounded.
    if scheme == "s3":
        config = {
            "retries": {"max_attempts": 0},
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": 64,
        }
        fs = module.S3FileSystem(config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
        fs.retries = 1
        return fs
    token = {"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {}
    # The class of the JSON API: the other one appends to objects of zonal buckets, which shows parts of them.
    return module.core.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True, **token)


def library(scheme: str) -> Any:
    module, extra = _EXTRAS[scheme]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{scheme}:// needs {module}: pip install 'medswav[{extra}]'") from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if any."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return cast("int | None", response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        number = getattr(cause, "code", None)
        if str(number).isdigit():
            return int(str(number))
    return None


def code(error: BaseException) -> str:
    """The S3 error code behind an error, or ""."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def answer(error: BaseException) -> str:
    """What a store answered, in a few words of its own closed vocabulary: never a key or a path."""
    if status(error) is not None:
        return f"it answered {status(error)} {code(error)}".rstrip()
    return f"no answer: {type(error).__name__}"


def is_transient(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    if isinstance(error, (DamagedError, ConnectionError, TimeoutError)):
        return True
    if status(error) in _TRANSIENT_STATUS or code(error) in _TRANSIENT_CODES:
        return True
    return any(c.__name__ in _TRANSIENT_CLASSES for c in type(error).__mro__)
