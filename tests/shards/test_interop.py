"""Other tools read a dataset without our code: webdataset reads shards, DuckDB and pyarrow the catalogue."""

import json
import os
import subprocess
import sys

import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from shards import catalog
from tests.shards import make

READER = """
import json, sys
import webdataset
samples = []
for sample in webdataset.WebDataset(sys.argv[1], shardshuffle=False):
    samples.append([sample["__key__"], len(sample["j2c"]), json.loads(sample["json"])])
print(json.dumps(samples))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop")
    make.build(folder / "root", folder / "scratch", units=2)
    return folder / "root"


def test_vanilla_webdataset_reads_every_sample_in_secure_mode(dataset):
    pytest.importorskip("webdataset")
    rows = {row["key"]: row for row in catalog.load(dataset, "ct").to_pylist()}
    (shard,) = (dataset / "shards" / "ct").iterdir()
    environment = os.environ | {"WDS_SECURE": "1"}
    command = [sys.executable, "-c", READER, str(shard)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    samples = json.loads(done.stdout)
    assert {key for key, _, _ in samples} == set(rows) and len(samples) == len(rows)
    for key, size, row in samples:
        assert size == rows[key]["size"] and row["pixel_digest"] == rows[key]["pixel_digest"]


def test_duckdb_reads_the_catalogue(dataset):
    duckdb = pytest.importorskip("duckdb")
    query = (
        "select modality, count(*), min(rows), count(distinct key) from read_parquet(?) group by 1 order by 1"
    )
    found = duckdb.execute(query, [str(dataset / "catalog" / "*" / "*.parquet")]).fetchall()
    assert found == [("ct", 4, 40, 4), ("xr", 4, 40, 4)]


def test_pyarrow_reads_the_catalogue_and_the_quarantine(dataset):
    table = pads.dataset(dataset / "catalog", format="parquet").to_table()
    assert table.sort_by("key").equals(catalog.load(dataset))
    parts = sorted((dataset / "quarantine").iterdir())
    assert sum(pq.read_table(p).num_rows for p in parts) == catalog.quarantine(dataset).num_rows == 2
