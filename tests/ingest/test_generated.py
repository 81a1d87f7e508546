"""Every generated file becomes what its manifest says: samples, or a refusal with that reason."""

from collections import Counter

import pytest

from ingest.deidentify import source_id
from ingest.labels import join_labels
from ingest.synthetic.build import build
from shards import catalog
from shards.verify import verify
from tests.ingest.files import NAMES, ingest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    manifest = build(folder / "source", patients=4, workers=1)
    ingest(folder / "source", folder / "out")
    return manifest, folder / "source", folder / "out"


def test_every_file_ends_as_expected(made):
    manifest, _, out = made
    found = Counter(catalog.load(out)["source"].to_pylist())
    refused = {r["source"]: r["reason"] for r in catalog.quarantine(out).to_pylist() if r["frame"] == -1}
    for file in manifest.files:
        source = source_id(file.file, NAMES)
        if file.expected == "duplicate" or refused.get(source) == "duplicate":
            continue  # of two equal files either may be the one that is kept
        if file.expected == "ok":
            assert found[source] == file.images, (file, refused.get(source))
        else:
            assert refused.get(source) == file.expected, (file, refused.get(source))
    expected = Counter(file.expected for file in manifest.files)
    assert Counter(refused.values())["duplicate"] == expected["duplicate"] == 1
    assert not verify(out, deep=True).problems


def test_labels_reach_every_accepted_image(made):
    manifest, source, out = made
    table = join_labels(out, source / "labels.csv", NAMES, sources=[source])
    assert table.num_rows == sum(manifest.images().values())


def test_counts_by_modality_are_those_of_the_manifest(made):
    manifest, _, out = made
    counts = {m: sum(splits.values()) for m, splits in catalog.counts(out).items()}
    assert counts == manifest.images()
