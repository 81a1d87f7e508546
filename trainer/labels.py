"""Labels for training: which label tables a run takes, their classes in a fixed order, and the values of the
samples. Imports no torch.

A table of the dataset (docs/dataset.md) is joined by key to the samples of the configured split, and to no
others: neither its rows of other splits nor a class that only those have reach a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards import catalog
from shards.errors import UserError
from shards.row_file import fixed_keys
from trainer.config import LabelSetConfig, TrainConfig

UNKNOWN = -1  # a sample without a label, or an entry of one that its row says nothing about
_FIELDS = {"classes": "label", "multi": "labels"}
_UNKNOWN_FIELD = "unknown"  # of kind multi, optional: the entries about which a row says nothing


@dataclass(frozen=True)
class LabelSet:
    """A label table as a run knows it from its first step to its last. classes: sorted, the order of the
    head's outputs; digest: of the table's file."""

    name: str
    kind: str
    classes: tuple[str, ...]
    digest: str


def label_sets(config: TrainConfig) -> tuple[LabelSet, ...]:
    """Those of supervision.labels, in its order. Raises UserError for tables that cannot be trained on."""
    wanted = config.supervision.labels
    if not wanted:
        return ()
    return tuple(_label_set(config, one) for one in wanted)


def from_json(trees: Sequence[Mapping[str, Any]]) -> tuple[LabelSet, ...]:
    """Back from dataclasses.asdict and JSON."""
    return tuple(LabelSet(**{**tree, "classes": tuple(tree["classes"])}) for tree in trees)


@dataclass(frozen=True)
class SampleLabels:
    """Labels of the samples of one modality. keys: bytes [rows], sorted; values: int64 [rows + 1] (classes)
    or int8 [rows + 1, C] (multi); the last row is all UNKNOWN. Memory is that of the labels, not of the
    samples."""

    keys: NDArray[np.bytes_]
    values: NDArray[Any]

    def of(self, samples: Sequence[str]) -> NDArray[Any]:
        """By the keys of samples. classes: int64 [n], the class or UNKNOWN. multi: int8 [n, C], 1, 0 or
        UNKNOWN."""
        found: NDArray[Any] = self.values[_places(self.keys, fixed_keys(pa.array(samples, pa.string())))]
        return found


def _places(keys: NDArray[np.bytes_], wanted: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """The row of each wanted key in the sorted `keys`, len(keys) where it is not there."""
    place = np.searchsorted(keys, wanted)
    there = np.zeros(len(wanted), bool)
    inside = place < len(keys)
    there[inside] = keys[place[inside]] == wanted[inside]
    return np.where(there, place, len(keys))


def sample_labels(config: TrainConfig, sets: Sequence[LabelSet]) -> dict[str, dict[str, SampleLabels]]:
    """{label set: {modality: SampleLabels}}.

    Raises UserError where a table is no longer the one that the run began with.
    """
    found = {}
    for wanted, known in zip(config.supervision.labels, sets, strict=True):
        table, digest = _rows(config, wanted)
        if digest != known.digest:
            raise UserError(
                f"the labels {wanted.name!r} changed while the run goes on, which would change its batches: "
                "put the table back, or start another run folder to train on what it holds now"
            )
        values = _classes(table, known.classes) if wanted.kind == "classes" else _multi(table, known.classes)
        labelled = SampleLabels(fixed_keys(table["key"].combine_chunks()), values)
        chosen = wanted.modalities or config.data.modalities
        nothing = SampleLabels(labelled.keys[:0], values[-1:])
        found[wanted.name] = {m: labelled if m in chosen else nothing for m in config.data.modalities}
    return found


def _label_set(config: TrainConfig, wanted: LabelSetConfig) -> LabelSet:
    table, digest = _rows(config, wanted)
    chosen = wanted.modalities or config.data.modalities
    used = table.filter(pa.array(_of_samples(config, chosen, fixed_keys(table["key"].combine_chunks()))))
    names = used[_FIELDS[wanted.kind]].combine_chunks()
    if wanted.kind == "multi":
        more = [used[_UNKNOWN_FIELD].combine_chunks()] if _UNKNOWN_FIELD in used.column_names else []
        names = pa.concat_arrays([part.flatten() for part in (names, *more)])
    classes = tuple(sorted(set(names.drop_null().to_pylist())))
    least = 2 if wanted.kind == "classes" else 1
    if len(classes) < least:
        raise UserError(
            f"the labels {wanted.name!r} give {used.num_rows} images of split {config.data.split} "
            f"({', '.join(chosen)}) {len(classes)} classes, at least {least} are needed: label more of them, "
            "or take the set out of supervision.labels"
        )
    return LabelSet(wanted.name, wanted.kind, classes, digest)


def _rows(config: TrainConfig, wanted: LabelSetConfig) -> tuple[pa.Table, str]:
    """The table without its rows of other splits, and its digest."""
    table, digest = catalog.labels_with_digest(config.data.dataset, wanted.name)
    field = _FIELDS[wanted.kind]
    if field not in table.column_names:
        kinds = [kind for kind, name in _FIELDS.items() if name in table.column_names]
        fix = f"set its kind to {kinds[0]}" if kinds else "take a table of kind classes or multi"
        raise UserError(f"the labels {wanted.name!r} are not of kind {wanted.kind}: {fix}")
    if "split" in table.column_names and config.data.split != "all":
        table = table.filter(pc.is_in(table["split"], value_set=pa.array(["", config.data.split])))
    return table.filter(pc.is_valid(table[field])).sort_by("key"), digest


def _of_samples(
    config: TrainConfig, modalities: Sequence[str], keys: NDArray[np.bytes_]
) -> NDArray[np.bool_]:
    """Which of the sorted keys are those of samples of the configured split; a catalogue part at a time."""
    split = None if config.data.split == "all" else config.data.split
    found = np.zeros(len(keys) + 1, bool)
    for modality in modalities:
        for table in catalog.select(config.data.dataset, modality, split).tables(["key"]):
            found[_places(keys, fixed_keys(table["key"].combine_chunks()))] = True
    return found[:-1]


def _classes(table: pa.Table, classes: Sequence[str]) -> NDArray[np.int64]:
    """[rows + 1]; UNKNOWN too for a class that only other splits have."""
    place = pc.index_in(table["label"].combine_chunks(), value_set=pa.array(classes, pa.string()))
    known = pc.fill_null(place, UNKNOWN).to_numpy(zero_copy_only=False)
    return np.append(known.astype(np.int64), UNKNOWN)


def _multi(table: pa.Table, classes: Sequence[str]) -> NDArray[np.int8]:
    """[rows + 1, C]: 1 for the labels of a row, UNKNOWN for its unknown ones, 0 for the others."""
    values = np.zeros((table.num_rows + 1, len(classes)), np.int8)
    value_set = pa.array(classes, pa.string())
    for column, value in ((_UNKNOWN_FIELD, UNKNOWN), ("labels", 1)):
        if column not in table.column_names:
            continue
        lists = table[column].combine_chunks()
        place = pc.index_in(pc.list_flatten(lists), value_set=value_set)
        row = pc.list_parent_indices(lists).filter(pc.is_valid(place))
        values[row.to_numpy(), place.drop_null().to_numpy()] = value
    values[-1] = UNKNOWN
    return values
