"""Each bench prints figures of one shape, with a baseline of the same run; tiny sizes, no claim on speed."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from orchestration import (
    bench,
    bench_augment,
    bench_catalogue,
    bench_files,
    bench_images,
    bench_ingest,
    bench_plan,
    bench_read,
    bench_step,
    bench_store,
)
from orchestration.bench import Figure, figure, take_turns
from shards import catalog
from shards.errors import UserError

KEYS = {"bench", "name", "value", "unit", "baseline", "ratio", "versus", "turns", "detail", "machine"}


def check(figures: Iterator[Figure]) -> list[Figure]:
    found = list(figures)
    for item in found:
        assert item.value > 0 and item.baseline > 0 and item.ratio > 0 and item.versus and item.turns >= 3
    assert len({item.name for item in found}) == len(found)
    return found


def test_the_ratio_is_above_one_for_what_is_better() -> None:
    assert figure("x", 20, "images/s", 10, "b", 3).ratio == 2
    assert figure("x", 10, "ms", 20, "b", 3).ratio == 2
    assert figure("x", 20, "ms", 10, "b", 3).ratio == 0.5


def test_sides_take_turns_and_may_measure_themselves() -> None:
    calls: list[str] = []

    def ours() -> float:
        calls.append("a")
        return 2.5

    def theirs() -> None:
        calls.append("b")

    took, turns = take_turns({"ours": ours, "theirs": theirs}, 1e-9)
    assert turns == bench.MINIMUM_TURNS and took["ours"] == 2.5 and took["theirs"] < 1
    assert calls == list("ab" + "ab" + "ba" + "ab")  # warm-up, then in alternating order


def test_a_figure_is_one_json_object_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(seconds: float) -> Iterator[Figure]:
        yield figure("x", 1.23456789, "images/s", 0.5, "the other way", 4, "detail")

    monkeypatch.setattr(bench_read, "measure", measure)
    bench.run("read", 1.0)
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert set(record) == KEYS
    assert record["value"] == 1.235 and record["ratio"] == 2.469 and record["machine"]["cpus"] >= 1


@pytest.mark.parametrize(("name", "seconds"), [("nonsense", 1.0), ("read", 0.0), ("read", -1.0)])
def test_a_wrong_name_or_budget_is_a_user_error(name: str, seconds: float) -> None:
    with pytest.raises(UserError):
        bench.run(name, seconds)


def test_the_made_up_dataset_is_a_dataset(tmp_path: Path) -> None:
    bench_images.write_dataset(tmp_path / "d", tmp_path / "s", 6, side=64, shards=2)
    assert catalog.counts(tmp_path / "d") == {"ct": {"train": 6, "val": 0, "test": 0}}
    one, two = bench_images.ct_slice(0, 64), bench_images.ct_slice(1, 64)
    assert one.dtype == np.int16 and not np.array_equal(one, two)


READ = ["undecoded", "decoded", "decoded_half", "decoded_quarter", "undecoded_litdata", "checked"]
LOCALITY = ["shards_at_a_time", "requests_a_step"]


def test_bench_read_measures_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setattr(bench_read, "_litdata", lambda folder, root, places: lambda: None)  # torch: seconds
    monkeypatch.setattr(bench_store, "figures", lambda root, places, seconds: ())
    monkeypatch.setattr(bench_store, "STEPS", 32)
    found = list(bench_read.measure(0.01, samples=8, side=64))
    assert [item.name for item in found] == [f"read_{name}" for name in READ + LOCALITY]
    check(iter(found[:-2]))
    shards, requests = found[-2:]
    assert shards.value <= shards.baseline and requests.value <= requests.baseline and requests.ratio >= 1


@pytest.mark.chaos
def test_bench_read_measures_litdata_and_an_object_store() -> None:
    names = [item.name for item in bench_read.measure(0.01, samples=32, side=64)]
    assert names == [f"read_{name}" for name in [*READ, "object_store", *LOCALITY]]


def test_bench_augment_measures_views_and_bands() -> None:
    if not (find_spec("torchvision") and find_spec("monai")):
        pytest.skip("the baselines are not installed")
    names = [
        item.name
        for item in check(bench_augment.measure(0.01, images=1, sides={"ct": 128, "xr": 160}, scale=0.1))
    ]
    of_each = ("", "_paper", "_demo", "_vs_torchvision", "_vs_torchvision_grey", "_vs_monai")
    assert names == [f"augment_{m}{kind}" for m in ("ct", "xr") for kind in of_each] + ["bands_with_energies"]


def test_bench_step_measures_the_step_and_the_sinkhorn() -> None:
    names = [item.name for item in check(bench_step.measure(0.01, nets=(), sinkhorns={"tiny": (2, 8, 16)}))]
    assert names == ["sinkhorn_tiny_1_rank", "sinkhorn_demo_2_ranks", "step_resnet-tiny_2_ranks"]


def test_the_step_that_ours_is_compared_with_has_the_same_losses() -> None:
    sides = bench_step._sides(bench_step._config("resnet-tiny"))
    for step in range(3):
        losses = {name: float(take()) for name, take in sides.items()}
        assert losses["ours"] == pytest.approx(losses["reference"], rel=1e-5 * 10**step), step


def test_bench_ingest_measures_rates_per_core_and_memory() -> None:
    assert {item.unit for item in check(bench_ingest.measure(0.01, patients=2, slices=2))} == {
        "slices/s and core",
        "files/s and core",
        "bytes",
    }


def test_bench_plan_measures_rows_time_and_memory() -> None:
    found = list(bench_plan.measure(0.01, rows=3000))
    assert all(item.value > 0 and item.baseline > 0 and "units" in item.detail for item in found)
    assert [item.name for item in found] == ["plan_rows", "plan_seconds", "plan_memory"]


def test_bench_files_measures_scan_and_plan_for_each_number_of_files() -> None:
    found = list(bench_files.measure(0.01, files=(60, 20), convert_up_to=1))
    assert [item.name for item in found] == ["files_plan_20", "files_plan_60"]
    assert found[0].ratio == 1 and all(item.value > 0 and "MB" in item.detail for item in found)


def test_the_catalogue_is_measured_with_a_file_of_the_node_and_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_catalogue, "PROCESSES", (1,))
    found = {item.name: item for item in bench_catalogue.measure(1.0, rows=3000)}
    assert {"catalogue_private_1", "catalogue_build", "catalogue_open", "catalogue_row"} <= found.keys()
    assert "3,000 rows, 13 units" in found["catalogue_build"].detail
