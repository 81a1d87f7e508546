"""Labels of a batch: joined by key, of the split that is trained on and of no other."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards import catalog
from shards.errors import UserError
from shards.store import Store
from tests.batches import make
from trainer import workers
from trainer.batches import BatchMaker
from trainer.config import TrainConfig
from trainer.labels import LabelSet, label_sets

LISTS = pa.list_(pa.string())


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sample n of each modality: class n % 3 ("test" in the test split), without a label where n % 4 is 3."""
    folder: Path = tmp_path_factory.mktemp("labelled")
    (folder / "scratch").mkdir()
    root = make.dataset(folder / "data", folder / "scratch")
    rows = [(m, n, key(m, n)) for m, count in make.COUNTS.items() for n in range(count + 2)]
    in_test = {(m, n) for m, n, _ in rows if n >= make.COUNTS[m]}
    rows = [(m, n, k) for m, n, k in rows if n % 4 != 3]
    classes = ["test" if (m, n) in in_test else f"c{n % 3}" for m, n, _ in rows]
    write(root, "finding", rows, label=pa.array(classes))
    write(
        root,
        "signs",
        rows,
        labels=pa.array(
            [
                ["b", "a"] if n % 2 else ([] if c != "test" else ["test"])
                for (_, n, _), c in zip(rows, classes, strict=True)
            ],
            LISTS,
        ),
        unknown=pa.array([["c"] if n % 3 else None for _, n, _ in rows], LISTS),
    )
    splits = ["test" if n % 3 == 0 else ("" if n % 3 == 1 else "train") for _, n, _ in rows]
    write(root, "own-split", rows, label=pa.array(classes), split=pa.array(splits))
    write(root, "boxes", rows, boxes=pa.array([[]] * len(rows), LISTS))
    write(root, "one", rows, label=pa.array(["always"] * len(rows)))
    return root


def key(modality: str, number: int) -> str:
    return make.PSEUDONYMS.id("sample", f"{modality}{number}")


def write(root: str, name: str, rows: list[tuple[str, int, str]], **columns: pa.Array) -> None:
    catalog.write_labels(Store(Path(root)), name, pa.table({"key": [k for _, _, k in rows], **columns}))


def config(root: str, *sets: dict[str, Any], split: str = "train") -> TrainConfig:
    tree = make.config(root, energy_probability=0.0).model_dump()
    return TrainConfig.model_validate(
        tree | {"data": tree["data"] | {"split": split}, "supervision": {"labels": sets}}
    )


def by_key(settings: TrainConfig, name: str, steps: int = 4, world: int = 1) -> dict[str, Any]:
    """What the batches of a few steps, which hold every sample, say of each key."""
    makers = [BatchMaker(settings, rank, world, None) for rank in range(world)]
    found: dict[str, Any] = {}
    for step in range(steps):
        for maker in makers:
            batch = maker(step)
            for sample, value in zip(batch.keys, batch.labels[name].tolist(), strict=True):
                assert found.setdefault(sample, value) == value
    return found


def test_classes_are_joined_by_key_and_no_test_label_is_among_them(labelled):
    settings = config(labelled, {"name": "finding"})
    (one,) = label_sets(settings)
    assert one.classes == ("c0", "c1", "c2")  # sorted; not the class that the test split alone has
    found = by_key(settings, "finding")
    assert found == {
        key(m, n): -1 if n % 4 == 3 else n % 3 for m, count in make.COUNTS.items() for n in range(count)
    }
    (everything,) = label_sets(config(labelled, {"name": "finding"}, split="all"))
    assert everything.classes == ("c0", "c1", "c2", "test")


def test_several_labels_may_be_unknown_one_by_one(labelled):
    settings = config(labelled, {"name": "signs", "kind": "multi"})
    assert label_sets(settings)[0].classes == ("a", "b", "c")
    for sample, value in by_key(settings, "signs").items():
        n = next(n for m in make.MODALITIES for n in range(make.COUNTS[m]) if key(m, n) == sample)
        assert value == ([-1] * 3 if n % 4 == 3 else [n % 2, n % 2, -1 if n % 3 else 0])


def test_rows_that_the_table_itself_gives_to_another_split_do_not_count(labelled):
    settings = config(labelled, {"name": "own-split"})
    assert label_sets(settings)[0].classes == ("c1", "c2")
    found = by_key(settings, "own-split")
    assert found == {
        key(m, n): -1 if n % 4 == 3 or n % 3 == 0 else n % 3 - 1
        for m, count in make.COUNTS.items()
        for n in range(count)
    }


def test_a_set_for_one_modality_says_nothing_of_others_and_ranks_share_it(labelled):
    settings = config(labelled, {"name": "finding", "modalities": ["us"]})
    whole = by_key(settings, "finding")
    assert by_key(settings, "finding", world=2) == whole
    of_us = {key("us", n) for n in range(make.COUNTS["us"]) if n % 4 != 3}
    assert {sample for sample, value in whole.items() if value >= 0} == of_us


def test_a_table_that_changed_since_the_run_began_is_refused(labelled):
    settings = config(labelled, {"name": "finding"})
    (one,) = label_sets(settings)
    then = LabelSet(one.name, one.kind, one.classes, "another table")
    for make_batches in (BatchMaker, workers.make_batches):
        with pytest.raises(UserError, match="the labels 'finding' changed while the run goes on"):
            make_batches(settings, 0, 1, None, None, (then,))(0)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"name": "none"}, "has no labels 'none'"),
        ({"name": "signs"}, "not of kind classes: set its kind to multi"),
        ({"name": "boxes"}, "take a table of kind classes or multi"),
        ({"name": "one"}, r"give 2\d images of split train .* 1 classes, at least 2"),
    ],
)
def test_a_table_that_cannot_be_trained_on_is_one_clear_line(labelled, wanted, text):
    with pytest.raises(UserError, match=text):
        label_sets(config(labelled, wanted))


def test_batches_without_labels_hold_none(labelled):
    assert BatchMaker(config(labelled), 0, 1, None)(0).labels == {}
    found = BatchMaker(config(labelled, {"name": "finding"}), 0, 1, None)(0).labels["finding"]
    assert found.dtype == np.int64 and found.shape == (12,)
