"""What `medswav compare` works on: one dataset of all tables of a plan, with the labels of its tasks.

The tables are public sets that were put together one by one, so the same patient may be in two of them, with
another split in each. Such a patient keeps the images of the most held-out split (test before val before
train) and loses the others: nothing of a test patient may be trained on.

For choosing settings (`--tune`) the images of test are left out, and a third of the patients of train takes
their place, another one for each of three seeds. (A cross-validation over the images that an encoder was
trained on, if without their labels, flatters it.)
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

from orchestration.compare_plan import Plan
from shards import catalog
from shards.errors import UserError
from shards.ids import create_key, digest
from shards.objects import open_store
from trainer import files
from trainer.downstream.compare import draw_labels

if TYPE_CHECKING:
    from ingest.config import IngestConfig

_ORDER = ("train", "val", "test")
Rows = list[dict[str, str]]


def build_dataset(
    plan: Plan, data: Path, out: Path, stream: TextIO | None = None, *, third: int | None = None
) -> bool:
    """OUT/dataset with a label table of each task; False when it was stopped. Already there: nothing to do.
    Raises UserError."""
    from orchestration.ingest_job import run_ingest

    config = ingest_config(plan, data, out, third=third)
    if all(task.name in _label_names(out) for task in plan.tasks) and (out / "dataset.done").is_file():
        return True
    summary = run_ingest(config, stream=stream)
    if summary.interrupted:
        return False
    if summary.exit_code:
        raise UserError("the ingest of the images is not complete: see the lines above")
    files.replace_file(out / "dataset.done", b"")
    return True


def ingest_config(plan: Plan, data: Path, out: Path, *, third: int | None = None) -> "IngestConfig":
    """Writes OUT/tables and, once, OUT/key. third: of train, to be held out in the place of test. Raises
    UserError for tables that cannot be used."""
    from ingest.config import load_config
    from ingest.tables import read_rows

    tables = {name: _checked(read_rows(data / name), plan, name) for name in plan.tables}
    folder = out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {"file": str((data / name).parent.absolute() / row["file"]), **_columns(row, plan)}
        for name, rows in tables.items()
        for row in rows
    ]
    kept = keep_held_out(listed)
    if third is not None:
        kinds = [_kind(name, row, plan) for name, rows in tables.items() for row in rows]
        kept = hold_out(kept, {row["file"]: kind for row, kind in zip(listed, kinds, strict=True)}, third)
    _write(folder / "images.csv", kept)
    for task in plan.tasks:
        parent = (data / task.table).parent.absolute()
        labelled = [
            {"file": str(parent / row["file"]), "label": task.classes[row[task.column]]}
            for row in tables[task.table]
            if row.get(task.column) in task.classes
        ]
        if not labelled:
            raise UserError(f"task {task.name}: no row of {task.table} has one of its classes")
        _write(folder / f"{task.name}.csv", labelled)
    if not (out / "key").exists():
        create_key(out / "key")
    return load_config(
        {
            "sources": [str((data / name).parent.absolute()) for name in plan.tables],
            "output": str(out / "dataset"),
            "key_file": str(out / "key"),
            "tables": [{"path": str(folder / "images.csv"), "split_column": "split"}],
            "labels": [{"path": str(folder / f"{t.name}.csv"), "name": t.name} for t in plan.tasks],
            "allow_burned_in": True,  # the pictures of a public set: nothing leaves OUT
        }
    )


def keep_held_out(rows: Rows) -> Rows:
    """Of every patient only the images of the most held-out split that any of its images has."""
    best: dict[str, int] = {}
    for row in rows:
        best[row["patient"]] = max(best.get(row["patient"], 0), _ORDER.index(row["split"]))
    return [row for row in rows if _ORDER.index(row["split"]) == best[row["patient"]]]


def hold_out(rows: Rows, kinds: Mapping[str, str], third: int) -> Rows:
    """Without the images of test; a third (0, 1, 2) of the patients of train becomes the split test instead.

    kinds: by file. Every third patient of each kind (the one of its first image), in the order of a digest of
    the patient: each class keeps its share, also where it has a dozen patients.
    """
    rows = [row for row in rows if row["split"] != "test"]
    patients: dict[str, list[str]] = {}
    for patient, row in {row["patient"]: row for row in reversed(rows) if row["split"] == "train"}.items():
        patients.setdefault(kinds[row["file"]], []).append(patient)
    held = {
        patient
        for of_kind in patients.values()
        for patient in sorted(of_kind, key=_order_of_holding_out)[third::3]
    }
    return [{**row, "split": "test"} if row["patient"] in held else row for row in rows]


def _order_of_holding_out(patient: str) -> str:
    return digest("hold out", patient)


def _kind(table: str, row: Mapping[str, str], plan: Plan) -> str:
    """What is held out in equal shares: the tables, and the classes of their tasks."""
    return "\0".join([table, *(row[task.column] for task in plan.tasks if task.table == table)])


def task_labels(out: Path, name: str) -> dict[str, str]:
    """Key to class of a task."""
    table = catalog.labels(str(out / "dataset"), name)
    return dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))


def labels_for_training(plan: Plan, out: Path, fraction: float, seed: int) -> list[str]:
    """Names of label tables of the dataset that hold the training labels of a fraction, those that the probe
    draws, and no others; written where they are not there yet."""
    names = []
    for task in plan.tasks:
        name = f"{task.name}-of-{seed}-{round(fraction * 1000)}"
        names.append(name)
        if name not in _label_names(out):
            catalog.write_labels(
                open_store(str(out / "dataset")), name, _drawn(out, task.name, fraction, seed)
            )
    return names


def _drawn(out: Path, task: str, fraction: float, seed: int) -> pa.Table:
    import numpy as np

    by_key = task_labels(out, task)
    train = catalog.load(str(out / "dataset"), columns=["key"], split="train")["key"].to_pylist()
    keys = sorted(key for key in train if key in by_key)
    names = sorted(set(by_key.values()))
    chosen = draw_labels(np.array([names.index(by_key[key]) for key in keys], np.int64), fraction, seed)
    kept = [keys[i] for i in chosen.tolist()]
    return pa.table({"key": pa.array(kept, pa.string()), "label": [by_key[key] for key in kept]})


def facts(out: Path) -> Mapping[str, Any]:
    """Images of each modality and split, and labels of each task: what a table of results has to say."""
    dataset = str(out / "dataset")
    return {
        "images": catalog.counts(dataset),
        "labels": {
            name: dict(Counter(task_labels(out, name).values())) for name in sorted(_label_names(out))
        },
    }


def _label_names(out: Path) -> list[str]:
    return catalog.label_names(str(out / "dataset")) if (out / "dataset" / "dataset.json").is_file() else []


def _checked(found: tuple[list[str], Rows], plan: Plan, name: str) -> Rows:
    columns, rows = found
    needed = ["file", plan.modality_column, plan.patient_column, plan.split_column]
    needed += [task.column for task in plan.tasks if task.table == name]
    missing = next((column for column in needed if column not in columns), None)
    if missing is not None:
        raise UserError(f"the table {name} has no column {missing!r}: correct the plan")
    if not all(row[plan.split_column].lower() in _ORDER for row in rows):
        raise UserError(f"the table {name} has a split that is not train, val or test: correct it")
    return rows


def _columns(row: Mapping[str, str], plan: Plan) -> dict[str, str]:
    # a row without a patient is its own patient
    patient = row[plan.patient_column] or row["file"]
    return {
        "modality": row[plan.modality_column],
        "patient": patient,
        "split": row[plan.split_column].lower(),
    }


def _write(path: Path, rows: Rows) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.replace_file(path, text.getvalue().encode())
