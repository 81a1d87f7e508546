"""What `build` promises of a folder of generated patients."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ingest.synthetic import IMAGES, LABELS, OK, PATIENTS, Manifest, build
from ingest.synthetic.build import plan
from ingest.synthetic.syntaxes import COLOR, GREY
from shards.errors import UserError
from shards.schema import Reason

MODALITIES = {"ct", "mr", "xr", "us"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("patients")
    return folder, build(folder, patients=12, seed=7, workers=1)


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_equal_seeds_give_equal_bytes_whatever_the_workers(tmp_path: Path) -> None:
    one = build(tmp_path / "one", patients=4, seed=3, workers=1)
    two = build(tmp_path / "two", patients=4, seed=3, workers=2)
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_gives_other_patients(tmp_path: Path, built: tuple[Path, Manifest]) -> None:
    other = build(tmp_path / "other", patients=2, seed=8, workers=1)
    ours = set(contents(built[0]).values())
    theirs = {
        name: value for name, value in contents(tmp_path / "other").items() if name != "other/letter.dcm"
    }
    assert not ours & set(theirs.values())
    assert not {f.patient for f in other.files} & {f.patient for f in built[1].files} - {None}


def test_manifest_names_every_file_and_survives_json(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    assert set(contents(folder)) == {f.file for f in manifest.files} | set(manifest.tables)
    assert len({f.file for f in manifest.files}) == len(manifest.files)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_default_holds_800_images_or_more_of_four_modalities(built: tuple[Path, Manifest]) -> None:
    per_patient = {name: count / 12 for name, count in built[1].images().items()}
    assert set(per_patient) == MODALITIES
    assert all(count >= 3 for count in per_patient.values())
    assert sum(per_patient.values()) * PATIENTS >= 1200
    assert len(plan(Path("unused"), PATIENTS, 0)) == 4 * PATIENTS


def test_half_of_the_patients_of_each_modality_have_the_finding(built: tuple[Path, Manifest]) -> None:
    by_patient: dict[tuple[str, str | None], set[int | None]] = {}
    for file in built[1].accepted:
        by_patient.setdefault((file.modality, file.patient), set()).add(file.label)
    assert all(len(labels) == 1 for labels in by_patient.values())
    counts = Counter((modality, labels.pop()) for (modality, _), labels in by_patient.items())
    assert counts == {(modality, label): 6 for modality in MODALITIES for label in (0, 1)}


def test_label_tables_name_every_accepted_file(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    table = {row["file"]: row for row in rows(folder / LABELS)}
    for file in manifest.accepted:
        row = table[file.file]
        assert (row["label"], row["modality"], row["patient"]) == (
            str(file.label),
            file.modality,
            file.patient,
        )
    listed = rows(folder / IMAGES)
    pngs = {Path(f.file).name: f for f in manifest.accepted if f.syntax == "png"}
    assert {row["file"] for row in listed} == set(pngs)
    assert all(row["label"] == str(pngs[row["file"]].label) and row["modality"] == "xr" for row in listed)


def test_every_kind_of_refusal_is_there(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    assert {f.expected for f in manifest.refused} == {
        Reason.NOT_AN_IMAGE, Reason.UNREADABLE, Reason.SOP_CLASS_OUT_OF_SCOPE, Reason.BURNED_IN_RISK,
        Reason.DICOMDIR, Reason.NO_PIXEL_DATA, Reason.NO_MODALITY, Reason.TOO_SMALL, Reason.CONSTANT,
        Reason.MODALITY_OUT_OF_SCOPE, Reason.NO_PART10_HEADER, Reason.TRANSFER_SYNTAX, Reason.LABEL_MAP,
        Reason.NOT_LISTED, Reason.DUPLICATE,
    }  # fmt: skip
    copies = [f for f in manifest.refused if f.expected == Reason.DUPLICATE]
    hashes = contents(folder)
    originals = [name for name, value in hashes.items() if value == hashes[copies[0].file]]
    assert len(copies) == 1
    assert len(originals) == 2


def test_both_forms_of_every_modality_are_there(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    syntaxes = {f.syntax for f in manifest.accepted}
    assert {"nifti", "png"} < syntaxes
    photometric, classes, echoes = set(), set(), Counter()
    for file in manifest.accepted:
        if file.syntax in ("nifti", "png"):
            continue
        data = pydicom.dcmread(folder / file.file, stop_before_pixels=True)
        photometric.add((file.modality, data.PhotometricInterpretation))
        classes.add(data.SOPClassUID.name)
        if file.modality == "mr":
            echoes[(data.SeriesInstanceUID, int(data.EchoNumbers))] += 1
    assert {("xr", "MONOCHROME1"), ("xr", "MONOCHROME2"), ("us", "RGB"), ("us", "YBR_FULL")} <= photometric
    assert "Ultrasound Multi-frame Image Storage" in classes
    series = {uid for uid, _ in echoes}
    assert all(echoes[(uid, 1)] == echoes[(uid, 2)] > 0 for uid in series)


def test_every_syntax_is_used_and_decodes_to_a_varied_image(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    used = Counter(f.syntax for f in manifest.accepted)
    assert set(map(str, (*GREY, *COLOR))) | {"nifti", "png"} == set(used)
    first = {f.syntax: f for f in manifest.accepted if f.syntax not in ("nifti", "png")}
    for file in first.values():
        data = pydicom.dcmread(folder / file.file)
        assert data.file_meta.TransferSyntaxUID == file.syntax
        pixels = pydicom.pixels.pixel_array(data, raw=True)
        assert pixels.std() > 5
        assert (pixels.shape[0] if file.images > 1 else 1) == file.images


def test_ct_is_in_hounsfield_units(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    paddings = set()
    for file in [f for f in manifest.accepted if f.modality == "ct"][::2]:
        data = pydicom.dcmread(folder / file.file)
        hu = data.pixel_array.astype(float) * data.RescaleSlope + data.RescaleIntercept
        middle = hu[hu.shape[0] // 4 : -hu.shape[0] // 4, hu.shape[1] // 4 : -hu.shape[1] // 4]
        assert -1000 < np.median(middle) < 200
        assert np.percentile(hu, 2) < -850
        paddings.add(bool(hu.min() == -2000))
    assert paddings == {True, False}


def test_nifti_volumes_are_read_by_nibabel_with_their_number_of_slices(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    volumes = [f for f in manifest.accepted if f.syntax == "nifti"]
    assert volumes
    for file in volumes:
        image = nib.load(folder / file.file)
        assert image.shape[2] == file.images
        assert np.asarray(image.dataobj).std() > 5


def test_ultrasound_text_lies_outside_the_region(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    for file in [f for f in manifest.accepted if f.modality == "us" and f.images == 1][::3]:
        data = pydicom.dcmread(folder / file.file)
        pixels = pydicom.pixels.pixel_array(data, raw=True)
        region = data.SequenceOfUltrasoundRegions[0]
        top = pixels[: region.RegionLocationMinY0, :, 0]
        assert top.max() > 100  # the burned-in name
        inside = pixels[region.RegionLocationMinY0 : region.RegionLocationMaxY1 + 1]
        assert inside[:, region.RegionLocationMinX0 : region.RegionLocationMaxX1 + 1].shape[:2] == (
            region.RegionLocationMaxY1 - region.RegionLocationMinY0 + 1,
            region.RegionLocationMaxX1 - region.RegionLocationMinX0 + 1,
        )


def test_headers_hold_the_identities_that_the_manifest_lists(built: tuple[Path, Manifest]) -> None:
    folder, manifest = built
    identities = set(manifest.identities)
    file = next(f for f in manifest.accepted if f.modality == "ct")
    data = pydicom.dcmread(folder / file.file, stop_before_pixels=True)
    assert {str(data.PatientName), data.PatientID, data.PatientBirthDate, data.InstitutionName} <= identities
    assert data.private_block(0x0009, "MYTHHOLM HEADER 1")[0x01].value == str(data.PatientName)
    assert str(data.RequestAttributesSequence[0].RequestingPhysician) in identities


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        build(tmp_path, patients=2, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_progress_counts_up_to_the_number_of_patients(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build(tmp_path / "x", patients=2, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert OK == "ok"
