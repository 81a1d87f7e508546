"""Identity planted everywhere in a source reaches no byte of a dataset, no log line and no output."""

import gzip
import logging
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from ingest.convert import run_unit
from ingest.discover import inventory
from ingest.estimate import estimate
from ingest.labels import join_labels
from shards import catalog
from tests.ingest.files import NAMES, config, grey, ingest, tree, units, write

CANARY = "KANARIENVOGEL"
# Every VR that holds text or free bytes, in elements that carry identity in hospitals.
TEXTS = {
    "AccessionNumber": "SH",
    "PatientName": "PN",
    "PatientAddress": "LO",
    "PatientComments": "LT",
    "InstitutionAddress": "ST",
    "StationAETitle": "AE",
    "StudyDescription": "LO",
    "ProtocolName": "LO",
    "Manufacturer": "LO",
    "ManufacturerModelName": "LO",
    "DeviceSerialNumber": "LO",
    "OperatorsName": "PN",
    "ReferringPhysicianName": "PN",
    "ImageComments": "LT",
    "TextValue": "UT",
    "URNCodeValue": "UR",
    "LongCodeValue": "UC",
    "BodyPartExamined": "CS",
    "ViewPosition": "CS",
    "ImageLaterality": "CS",
    "SeriesDescription": "LO",
    "PatientID": "LO",
    "SoftwareVersions": "LO",
    "WindowCenterWidthExplanation": "LO",
}


def planted(path, modality="MR", **elements):
    write(path, modality=modality, **elements)
    data = pydicom.dcmread(path)
    with_canary = {name: f"{CANARY} {name}"[:64] for name in TEXTS}
    for name, vr in TEXTS.items():
        data.add_new(name, vr, with_canary[name] if vr != "CS" else f"{CANARY}{name[:3]}".upper())
    data.StudyInstanceUID = "1.2.826.424242424242.1"
    data.SeriesInstanceUID = "1.2.826.424242424242.2"
    data.SOPInstanceUID = f"1.2.826.424242424242.{sum(path.name.encode())}"
    data.PatientBirthDate, data.StudyDate = "19421107", "20190523"
    block = data.private_block(0x0009, CANARY, create=True)
    for offset, vr in enumerate(("LO", "UN", "OB", "SQ", "UT")):
        inner = Dataset()
        inner.PatientName = f"{CANARY}^nested"
        value = Sequence([inner]) if vr == "SQ" else CANARY if vr in ("LO", "UT") else CANARY.encode() + b"\0"
        block.add_new(offset, vr, value)
    deep = Dataset()
    for depth in range(4):
        outer = Dataset()
        outer.PatientID, outer.OtherPatientIDsSequence = f"{CANARY}{depth}", Sequence([deep])
        deep = outer
    data.OtherPatientIDsSequence = Sequence([deep])
    data.add_new(Tag(0x6000, 0x4000), "LT", f"{CANARY} overlay")
    data.add_new(Tag(0x6000, 0x3000), "OB", CANARY.encode() + b"\0")
    data.add_new(Tag(0x6000, 0x0022), "LO", CANARY)
    data.preamble = (CANARY.encode() * 10)[:128]
    data.file_meta.SourceApplicationEntityTitle = CANARY
    data.file_meta.ImplementationVersionName = CANARY
    data.save_as(path)
    path.write_bytes(path.read_bytes() + CANARY.encode())  # trailing bytes
    return path


def plant_all(folder):
    """Every kind of input, canaries wherever the format has room: 9 inputs, a table, a label table."""
    planted(folder / f"{CANARY}^John" / "scan1")
    planted(folder / f"{CANARY}^John" / "scan2", "CT", RescaleSlope=1, RescaleIntercept=0)
    broken = planted(folder / "broken")
    broken.write_bytes(broken.read_bytes()[:900])
    planted(folder / "lies", Rows=4000)
    (folder / f"{CANARY}.txt").write_text(CANARY)
    image = nibabel.Nifti1Image(grey("int16", 12, (40, 40, 3)), np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", CANARY.encode()))
    image.header["descrip"], image.header["aux_file"] = CANARY.encode(), CANARY.encode()
    image.header["db_name"], image.header["intent_name"] = CANARY.encode(), CANARY.encode()
    nibabel.save(image, folder / f"sub-{CANARY}.nii")
    (folder / "packed").write_bytes(gzip.compress((folder / f"sub-{CANARY}.nii").read_bytes()))
    import cv2

    cv2.imwrite(str(folder / f"{CANARY}.png"), grey("uint8", 8))
    (folder / "images.csv").write_text(f"file,modality,patient,label\n{CANARY}.png,CR,{CANARY},{CANARY}\n")
    (folder / "labels.csv").write_text(f"file,label,name\n{CANARY}.png,yes,{CANARY}\nscan1,no,{CANARY}\n")
    return folder


@pytest.fixture
def source(tmp_path):
    return plant_all(tmp_path / f"{CANARY}_hospital")


SECRETS = [CANARY, CANARY.lower(), "424242424242", "19421107", "20190523", "_hospital"]


def found_in(content: bytes) -> list[str]:
    forms = {s: (s.encode(), s.encode("utf-16-le"), s.encode().hex().encode()) for s in SECRETS}
    return [s for s, encoded in forms.items() if any(e in content for e in encoded)]


@pytest.mark.parametrize("sandbox", ["inline", "process"])
def test_no_canary_reaches_the_dataset_the_logs_or_the_output(
    source, tmp_path, sandbox, caplog, capfd, recwarn
):
    caplog.set_level(logging.DEBUG)
    out = tmp_path / "out"
    settings = config(source, out, sandbox=sandbox, outputs=("slices", "volumes"))
    capfd.readouterr()
    recwarn.clear()
    caplog.clear()
    report = estimate(inventory(settings), settings)
    results = [run_unit(unit, settings, NAMES, out, tmp_path / "scratch") for unit in units(settings)]
    join_labels(out, source / "labels.csv", NAMES, sources=[source])

    assert catalog.load(out).num_rows >= 2 + 3 + 1  # the canaries were really read
    assert sum(result.inputs for result in results) == report.inputs == 9
    for name, content in tree(out).items():
        assert not found_in(content), f"{name.partition('/')[0]} holds identity"
        assert not found_in(name.encode())
    tables = (catalog.load(out), catalog.load(out, "mr_volumes"), catalog.quarantine(out))
    assert tables[1].num_rows == 1
    for table in (*tables, catalog.labels(out, "labels")):
        assert not found_in(str(table.to_pylist()).encode())  # Parquet pages are compressed on disk
    streams = capfd.readouterr()
    assert not found_in((streams.out + streams.err).encode())
    assert not found_in(caplog.text.encode())
    assert not found_in(" ".join(str(w.message) for w in recwarn).encode())
    assert not found_in(str([vars(r) for r in results]).encode())
    assert not list((tmp_path / "scratch").iterdir())


def test_what_tells_stacks_apart_never_leaves_the_header(tmp_path):
    """Image type, kernel and times are read to build volumes, and only compared."""
    for n in range(6):
        place = {"ImagePositionPatient": [0, 0, n % 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        names = {"ConvolutionKernel": f"{CANARY} {n // 3}", "EchoNumbers": "424242"}
        given = place | names | {"PixelSpacing": [1, 1], "RescaleSlope": 1, "RescaleIntercept": 0}
        planted(
            tmp_path / "s" / f"s{n}",
            "CT",
            pixels=grey(seed=n),
            SeriesInstanceUID="1.2.826.424242424242.9",
            **given,
        )
    ingest(tmp_path / "s", tmp_path / "out", outputs=("slices", "volumes"))
    table = catalog.load(tmp_path / "out", "ct_volumes")
    assert table["slices"].to_pylist() == [3, 3]  # the kernels were really told apart
    assert not found_in(str(table.to_pylist()).encode())
    assert not [name for name, content in tree(tmp_path / "out").items() if found_in(content)]


def test_the_search_for_canaries_would_find_them():
    assert found_in(f"x{CANARY}y".encode()) and found_in(CANARY.encode("utf-16-le"))
    assert not found_in(zlib.compress(b"nothing"))
