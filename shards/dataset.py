"""dataset.json: what a dataset was made with. A folder holds the output of one configuration only."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from shards.errors import UserError
from shards.schema import FORMAT_VERSION
from shards.store import Store

NAME = "dataset.json"
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class DatasetInfo:
    """The identity of a dataset. `config`: the settings that change output bytes, JSON values, no PHI."""

    codec: str
    fingerprint: str  # digest of `config` and of the versions of the conversion
    key_id: str
    config: dict[str, Any] = field(default_factory=dict)
    deidentification: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, ASCII, one line, no NaN: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def open_or_create(store: Store, info: DatasetInfo) -> DatasetInfo:
    """Write dataset.json if there is none; else hold `info` to it. Returns what is on disk.

    Raises UserError that names every setting that differs: a dataset is never mixed in silence.
    """
    if store.create(NAME, to_json(dataclasses.asdict(info))):
        return info
    found = read_info(store)
    differences = compare(found, info)
    if differences:
        raise UserError(
            f"{store.root} was made with other settings ({'; '.join(differences)}): "
            "use another output folder, or the settings of before"
        )
    return found


_FOLLOWING = ("columns", "volume_columns")  # from the other settings and the version


def compare(found: DatasetInfo, wanted: DatasetInfo) -> list[str]:
    """What differs, as "setting was A, now B"; empty where the two may share a folder."""
    same = all(
        getattr(found, name) == getattr(wanted, name)
        for name in ("format_version", "codec", "fingerprint", "key_id")
    )
    if same:
        return []
    old, new = _settings(found), _settings(wanted)
    differences = [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return differences or [f"fingerprint was {found.fingerprint}, now {wanted.fingerprint}"]


def _settings(info: DatasetInfo) -> dict[str, Any]:
    flat = {"format_version": info.format_version, "codec": info.codec, "key (its id)": info.key_id}
    for name, block in (("", info.config), ("deidentification.", info.deidentification)):
        plain = {key: value for key, value in json.loads(to_json(block)).items() if key not in _FOLLOWING}
        for key, value in _flatten(plain).items():
            flat.setdefault(name + key, value)
    return flat


def _flatten(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def read_info(store: Store) -> DatasetInfo:
    """dataset.json of a store. Raises UserError where there is none or it cannot be used."""
    try:
        raw = store.read(NAME)
    except FileNotFoundError:
        raise UserError(
            f"{store.root} is no dataset (no {NAME}): give the output folder of ingest run"
        ) from None
    try:
        values = json.loads(raw)
        version = int(values["format_version"])
        if version == FORMAT_VERSION:
            return DatasetInfo(**values | {"modalities": tuple(values["modalities"])})
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{store.root}/{NAME} is damaged: restore it, or use another output folder") from None
    fix = "upgrade medswav" if version > FORMAT_VERSION else "run ingest into a new output folder"
    raise UserError(
        f"{store.root} has format version {version}, this medswav reads version {FORMAT_VERSION}: {fix}"
    )
