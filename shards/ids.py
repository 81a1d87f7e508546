"""Keyed pseudonyms, the patient split, digests. Pure functions of a secret key: equal on every worker.

HMAC-SHA256 (RFC 2104), never a plain hash: identifiers come from small sets (PatientID, dates) that a plain
hash could not hide. Ids are 26 lower-case base32 characters (130 bits) and hold no dot, because WebDataset
takes everything after the first dot of a member's name for its extension.
"""

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import UserError
from shards.schema import Split

ID_LENGTH = 26
KEY_VARIABLE = "MEDSWAV_KEY"
MINIMUM_KEY_BYTES = 16
_HOW_TO_MAKE_A_KEY = "make one with: (umask 077; openssl rand -hex 32 > KEYFILE)"


def frame(*parts: bytes | str) -> bytes:
    """Join parts so that no two different sequences of parts give the same bytes.

    Lone surrogates (file names that are no UTF-8, a PatientID of an odd character set) keep 3 bytes each.
    """
    encoded = [p.encode("utf-8", "surrogatepass") if isinstance(p, str) else p for p in parts]
    return b"".join(len(p).to_bytes(8, "big") + p for p in encoded)


_LETTERS = "abcdefghijklmnopqrstuvwxyz234567"
_PAIRS = [first + second for first in _LETTERS for second in _LETTERS]  # of 10 bits each
_SHIFTS = range(5 * ID_LENGTH - 10, -1, -10)


def _base32(raw: bytes) -> str:
    """The first ID_LENGTH characters of RFC 4648 base32, lower case, of at least 17 bytes.

    base64.b32encode takes twice as long, and every file has several ids.
    """
    bits = int.from_bytes(raw[:17], "big") >> (8 * 17 - 5 * ID_LENGTH)
    return "".join([_PAIRS[bits >> shift & 1023] for shift in _SHIFTS])


def digest(*parts: bytes | str) -> str:
    """26 base32 characters (130 bits) of the SHA-256 of length-prefixed parts. Not keyed: for public content.

    SHA-256, because processors have instructions for it: a CT slice takes a third of the time of BLAKE2b.
    """
    return _base32(hashlib.sha256(frame(*parts)).digest())


def digest_framed(*framed: bytes | memoryview) -> str:
    """`digest` of parts that `frame` has joined already."""
    hasher = hashlib.sha256()
    for part in framed:
        hasher.update(part)
    return _base32(hasher.digest())


@dataclass(frozen=True)
class Pseudonymizer:
    """One-way ids under a secret key; `site` keeps equal PatientIDs of two hospitals apart."""

    key: bytes = field(repr=False)
    site: str = ""

    def __post_init__(self) -> None:
        if len(self.key) < MINIMUM_KEY_BYTES:
            raise ValueError(f"a key has at least {MINIMUM_KEY_BYTES} bytes")

    def _hmac(self, *parts: str) -> bytes:
        return hmac.new(self.key, frame(*parts), hashlib.sha256).digest()

    def id(self, kind: str, value: str) -> str:
        """The pseudonym of `value`; `kind` ("patient", "series", ...) keeps two kinds apart."""
        return _base32(self._hmac("id", self.site, kind, value))

    def split(self, patient: str, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> str:
        """train, val or test for an already pseudonymous patient id.

        A keyed bucket of the patient alone: no patient crosses splits and adding data moves nobody.
        Raises ValueError unless the fractions are non-negative and sum to 1.
        """
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("split fractions must be non-negative and sum to 1")
        bucket = (int.from_bytes(self._hmac("split", self.site, patient)[:8], "big") >> 11) / 2.0**53
        if bucket < fractions[0]:
            return Split.TRAIN.value
        # Compared from above, so that a fraction of 0 for the test split is exactly empty.
        return Split.VAL.value if bucket < 1 - fractions[2] else Split.TEST.value

    def shift_days(self, patient: str, most: int) -> int:
        """Days in [-most, most] by which every date of a pseudonymous patient moves: intervals stay true."""
        number = int.from_bytes(self._hmac("date shift", self.site, patient)[:8], "big")
        return number % (2 * most + 1) - most

    @property
    def site_id(self) -> str:
        """Short keyed id of the site: tells two apart, and names neither to who has no key."""
        return _base32(self._hmac("site-id", self.site))[:12]

    @property
    def key_id(self) -> str:
        """Short one-way id of the key (not of the site): tells two keys apart, safe to publish."""
        return _base32(self._hmac("key-id"))[:12]


def create_key(path: str | Path, key: bytes | None = None) -> None:
    """Write a key (default: 32 random bytes) as hex text, mode 0600. Raises UserError if the file exists or
    cannot be made."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"the key file {path} exists already and is not overwritten: choose another name"
        ) from None
    except OSError as error:
        raise UserError(f"cannot create the key file {path}: {error.strerror}") from None
    with os.fdopen(fd, "w") as file:
        file.write((key or os.urandom(32)).hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_key(path: str | Path | None) -> bytes:
    """The key bytes of a file of hex text, or of the environment variable MEDSWAV_KEY where path is None.

    Raises UserError for a missing, unreadable, malformed or short key and for a file that others can read.
    """
    if path is None:
        text = os.environ.get(KEY_VARIABLE)
        if not text:
            raise UserError(f"no key: give a key file (key_file) or set {KEY_VARIABLE}; {_HOW_TO_MAKE_A_KEY}")
        return _parse_key(text, f"the environment variable {KEY_VARIABLE}")
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(4096)
    except FileNotFoundError:
        raise UserError(f"the key file {path} does not exist; {_HOW_TO_MAKE_A_KEY}") from None
    except OSError as error:
        raise UserError(f"cannot read the key file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"the key file {path} can be read by others (mode {mode:04o}): run chmod 600 {path}")
    return _parse_key(raw.decode("ascii", "replace"), f"the key file {path}")


def _parse_key(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        raise UserError(f"{where} is not hexadecimal text; {_HOW_TO_MAKE_A_KEY}") from None
    if len(key) < MINIMUM_KEY_BYTES:
        raise UserError(f"{where} holds fewer than {MINIMUM_KEY_BYTES} bytes; {_HOW_TO_MAKE_A_KEY}")
    return key
