"""Real files of many vendors (MANIFEST.csv): what is to be accepted is a sample, the rest has a reason."""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import pydicom
import pytest

from ingest.deidentify import source_id
from ingest.frames import Frame
from ingest.labels import join_labels
from ingest.sniff import read_head, sniff
from shards import catalog
from shards.schema import Reason
from shards.stats import pixel_digest
from shards.verify import verify
from tests.ingest.files import NAMES, ingest, read

DATA = Path(os.environ.get("MEDSWAV_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
MANIFEST = DATA / "dicom" / "MANIFEST.csv"
pytestmark = pytest.mark.skipif(not MANIFEST.exists(), reason="the folder of real test data is absent")

# Words of the manifest's `why` -> reasons that say the same.
FITTING = {
    "out of scope": {Reason.MODALITY_OUT_OF_SCOPE, Reason.SOP_CLASS_OUT_OF_SCOPE},
    "Modality tag missing": {Reason.NO_MODALITY},
    "tiny": {Reason.TOO_SMALL},
    "constant": {Reason.CONSTANT, Reason.TOO_SMALL},
    "no Part 10": {Reason.NO_PART10_HEADER},
    "no pixel data": {
        Reason.NO_PIXEL_DATA,
        Reason.NO_MODALITY,
        Reason.SOP_CLASS_OUT_OF_SCOPE,
        Reason.UNREADABLE,
    },
    "not a readable": {Reason.NOT_AN_IMAGE, Reason.UNREADABLE, Reason.NO_PART10_HEADER},
    "DICOMDIR": {Reason.DICOMDIR},
    "label map": {Reason.LABEL_MAP},
    "not decodable": {
        Reason.DECODE_FAILED,
        Reason.UNREADABLE,
        Reason.BAD_PIXEL_DESCRIPTION,
        Reason.DERIVED,
        Reason.NO_MODALITY,
    },
    "": {Reason.SOP_CLASS_OUT_OF_SCOPE},  # the rest names an object that is no image: SEG, SR, RTDOSE ...
}
RISKY = 10  # accepted files of classes with a high risk of burned-in text (captures, US without regions)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(MANIFEST, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("real") / "out"
    ingest(DATA / "dicom", out, allow_burned_in=True)
    return out


def reasons_of(out: Path) -> dict[str, set[str]]:
    reasons = defaultdict(set)
    for row in catalog.quarantine(out).to_pylist():
        reasons[row["source"]].add(row["reason"])
    return reasons


def test_every_accepted_file_is_a_sample_and_every_other_is_refused_fittingly(rows, dataset):
    assert not verify(dataset, deep=True).problems
    table = catalog.load(dataset)
    samples = Counter(table["source"].to_pylist())
    digests, instances = set(table["pixel_digest"].to_pylist()), set(table["instance"].to_pylist())
    reasons = reasons_of(dataset)
    wrong, kept_once = [], 0
    for row in rows:
        source = source_id(row["file"], NAMES)
        found = reasons[source]
        if row["expected"] == "ok" and not samples[source]:
            # The folder holds the same image in several syntaxes, and one instance twice with other pixels.
            frames = [
                i for i in read(DATA / "dicom" / row["file"], allow_burned_in=True) if isinstance(i, Frame)
            ]
            same = all(pixel_digest(f.pixels) in digests for f in frames) and found == {Reason.DUPLICATE}
            uids = {NAMES.id("instance", f.identifiers["instance"]) for f in frames}
            collision = uids <= instances and found == {Reason.UID_COLLISION}
            kept_once += 1
            if not frames or not (same or collision):
                wrong.append((row["file"], found))
        elif row["expected"] != "ok":
            fitting = next(reasons for words, reasons in FITTING.items() if words in row["why"])
            if samples[source] or not found or not found <= fitting:
                wrong.append((row["file"], row["why"], found, samples[source]))
    assert not wrong
    assert sum(row["expected"] == "ok" for row in rows) - kept_once > 110


def test_by_default_only_files_with_a_risk_of_burned_in_text_are_missing(rows):
    lost = Counter()
    for row in rows:
        if row["expected"] == "ok" and row["modality"] != "NIfTI":
            items = read(DATA / "dicom" / row["file"])
            lost.update({i.reason for i in items if not isinstance(i, Frame)})
    assert lost == {Reason.BURNED_IN_RISK: RISKY}


def test_a_family_of_lossless_syntaxes_decodes_to_the_same_pixels(rows):
    families = defaultdict(set)
    sizes = Counter()
    for row in rows:
        family = next((f for f in row["flags"].split(";") if f.startswith("family:")), None)
        if family is None or row["expected"] != "ok":
            continue
        frame = read(DATA / "dicom" / row["file"])[0]
        if not frame.columns["lossy_source"]:
            families[family].add(pixel_digest(frame.pixels))
            sizes[family] += 1
    assert sizes["family:dcm_qa_ts"] == 9 and sizes["family:d2n_generic_001-0001"] == 4
    assert {family: len(digests) for family, digests in families.items()} == dict.fromkeys(families, 1)


def test_pixels_are_those_of_the_manifest_and_of_pydicom(rows):
    compared = 0
    for row in rows:
        plain = (
            row["photometric"] == "MONOCHROME2"
            and row["modality"] == "MR"
            and row["decodes_with"] == "pydicom"
        )
        if row["expected"] != "ok" or not plain:
            continue
        path = DATA / "dicom" / row["file"]
        frames = [i for i in read(path, allow_burned_in=True) if isinstance(i, Frame)]
        theirs = pydicom.dcmread(path).pixel_array
        theirs = theirs if theirs.ndim == 3 else theirs[None]
        assert all((frame.pixels == theirs[frame.index]).all() for frame in frames), row["file"]
        if len(frames) == len(theirs):
            assert min(f.pixels.min() for f in frames) == float(row["min"])
            assert max(f.pixels.max() for f in frames) == float(row["max"])
        compared += 1
    assert compared > 60


@pytest.mark.parametrize("name", ["labelled/ct_contrast_dicom"])
def test_the_labelled_dicom_set_goes_from_file_to_label(tmp_path, name):
    folder = DATA / name
    if not folder.exists():
        pytest.skip("this set is absent")
    ingest(folder / "dicom", tmp_path / "out")
    table = join_labels(tmp_path / "out", folder / "labels.csv", NAMES, sources=[folder / "dicom"])
    assert table.num_rows == catalog.load(tmp_path / "out").num_rows > 30
    assert set(table["label"].to_pylist()) == {"contrast", "noncontrast"}


def test_sniffing_agrees_with_the_manifest(rows):
    for row in rows:
        if row["expected"] == "ok":
            kind = sniff(read_head(DATA / "dicom" / row["file"]))
            assert kind == ("nifti" if row["modality"] == "NIfTI" else "dicom")
