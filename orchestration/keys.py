"""Which key a dataset's pseudonyms come from: --key, else MEDSWAV_KEY, else `<dataset>.key` beside it.

The last is made by the first `ingest run` that is given no key, and announced: the quick start needs no
ceremony, and nothing is ever pseudonymised under a key that its owner cannot find. It lies beside the
dataset, not in it, so that a copied dataset does not carry it along.
"""

import os
from pathlib import Path

from shards.errors import UserError
from shards.ids import KEY_VARIABLE, create_key, load_key
from shards.objects import is_url


def beside(dataset: str | Path) -> Path:
    """`<dataset>.key`."""
    folder = Path(dataset).absolute()
    return folder.with_name(folder.name + ".key")


def must_be_made(file: str | Path | None, dataset: str | Path) -> bool:
    """Whether a first run without any key has to make one; never for a dataset in an object store."""
    given = file is not None or bool(os.environ.get(KEY_VARIABLE))
    if is_url(dataset):
        return False
    return not (given or beside(dataset).exists() or (Path(dataset) / "dataset.json").exists())


def make(dataset: str | Path, key: bytes | None = None) -> str:
    """Create `<dataset>.key` (mode 0600) of `key` or a new one; the sentence for its owner.

    Raises UserError.
    """
    path = beside(dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    create_key(path, key)
    return (
        f"no key was given: created {path} (mode 0600). Keep it secret, and keep it: later runs and labels "
        "need it, and only it links this dataset's pseudonyms to patients"
    )


def read(file: str | Path | None, dataset: str | Path) -> bytes:
    """The key bytes. Raises UserError where there is none, with the fix."""
    if file is not None:
        if not Path(file).exists():
            raise UserError(f"the key file {file} does not exist: create it with `ingest key {file}`")
        return load_key(file)
    if os.environ.get(KEY_VARIABLE):
        return load_key(None)
    if is_url(dataset):
        raise UserError(
            f"a dataset in an object store needs --key FILE or {KEY_VARIABLE}: no key is made or "
            "looked for there; make one with `ingest key FILE`"
        )
    if not beside(dataset).exists():
        raise UserError(
            f"the key of this dataset is neither given with --key, nor in {KEY_VARIABLE}, nor in "
            f"{beside(dataset)}: give the key of its first `ingest run`"
        )
    return load_key(beside(dataset))
