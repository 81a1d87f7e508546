"""Real files of many vendors (MANIFEST.csv): what is to be accepted is a sample, the rest has a reason."""

import csv
import os
import re
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

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

_SCOPE = {Reason.SOP_CLASS_OUT_OF_SCOPE}
# The manifest's `why`, word for word ("X": a modality, "...": the rest) -> reasons that say the same.
FITTING = {
    "modality X out of scope (pixels decode)": {Reason.MODALITY_OUT_OF_SCOPE},
    "RTDOSE": _SCOPE,
    "RTPLAN": _SCOPE,
    "Segmentation": _SCOPE,
    "derived object SEG": _SCOPE,
    "structured report": _SCOPE,
    "VL whole slide": _SCOPE,
    "Parametric map": _SCOPE,
    "Raw data": _SCOPE,
    "Color palette": _SCOPE,
    "Real world value mapping": _SCOPE,
    "DICOMDIR": {Reason.DICOMDIR},
    "Modality tag missing or empty": {Reason.NO_MODALITY},
    "tiny image (<=32 px; policy)": {Reason.TOO_SMALL},
    "tiny (<=32 px; policy)": {Reason.TOO_SMALL},
    "constant (blank) image": {Reason.CONSTANT, Reason.TOO_SMALL},  # one is 8 px wide as well
    "no Part 10 preamble (readable only with force=True; policy)": {Reason.NO_PART10_HEADER},
    "no Part 10 header / no transfer syntax (decodable only by guessing implicit VR LE)": {
        Reason.NO_PART10_HEADER
    },
    "not a readable DICOM file": {Reason.NOT_AN_IMAGE, Reason.UNREADABLE},
    "no pixel data": {Reason.NO_PIXEL_DATA, Reason.NO_MODALITY},  # four headers of hardly an element
    "no pixel data (X)": {Reason.NO_PIXEL_DATA},
    "no pixel data (ANN)": _SCOPE,
    "no pixel data (ECG)": _SCOPE,
    "no pixel data (MR)": {Reason.NO_PIXEL_DATA, Reason.UNREADABLE},  # they are cut off
    "label map / atlas colours, not an image (policy; ...": {Reason.LABEL_MAP},
    "pixel data not decodable: AttributeError: Missing required element: (0028,0010) 'Rows'": {
        Reason.BAD_PIXEL_DESCRIPTION
    },
    "pixel data not decodable: TypeError: object of type 'NoneType' has no len()": {Reason.UNREADABLE},
    # Found before the pixels are looked at: a screen save, and a file without a modality.
    "pixel data not decodable: RuntimeError: gdcm: ...": {
        Reason.DECODE_FAILED,
        Reason.DERIVED,
        Reason.NO_MODALITY,
    },
}


def fitting(why: str) -> set[Reason]:
    """The reasons for a `why`; KeyError for one that nobody has thought of."""
    if why in FITTING:
        return FITTING[why]
    general = re.sub(r"^modality \w+ out", "modality X out", why)
    general = re.sub(r"^no pixel data \(\w+\)$", "no pixel data (X)", general)
    for start in (
        "label map / atlas colours, not an image (policy; ",
        "pixel data not decodable: RuntimeError: gdcm: ",
    ):
        general = f"{start}..." if general.startswith(start) else general
    return {"modality OP out of scope (pixels decode)": _SCOPE}.get(why, set()) | FITTING[general]


# One instance is there twice with other pixels: the first is a sample, the other is kept out.
COLLISIONS = 1
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
    wrong, kept_once, collisions = [], 0, 0
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
            collisions += collision
            if not frames or not (same or collision):
                wrong.append((row["file"], found))
        elif row["expected"] != "ok" and (samples[source] or not found or not found <= fitting(row["why"])):
            wrong.append((row["file"], row["why"], found, samples[source]))
    assert not wrong
    assert sum(row["expected"] == "ok" for row in rows) - kept_once > 110
    assert collisions == COLLISIONS


def test_by_default_only_files_with_a_risk_of_burned_in_text_are_missing(rows):
    lost = Counter()
    for row in rows:
        if row["expected"] == "ok" and row["modality"] != "NIfTI":
            items = read(DATA / "dicom" / row["file"])
            lost.update({i.reason for i in items if not isinstance(i, Frame)})
    assert lost == {Reason.BURNED_IN_RISK: RISKY}


# Out of scope by default, "pixels decode", and still no sample where their modality is configured.
NEVER = {
    "1403-OB.dcm": Reason.TOO_SMALL,  # 3 x 3 pixels
    "SC_rgb_rle_32bit.dcm": Reason.BAD_PIXEL_DESCRIPTION,  # 32 bits a sample: no codec of ours holds them
    "SC_rgb_32bit.dcm": Reason.BAD_PIXEL_DESCRIPTION,
    "SC_rgb_expb_32bit.dcm": Reason.BAD_PIXEL_DESCRIPTION,
}


def everything(row, **more):
    """Items of a row's file when its modality has a partition of its own, at full size."""
    modalities = (
        {"modalities": {row["modality"]: row["modality"].lower()}} if row["modality"] in OTHERS else {}
    )
    path = DATA / "dicom" / row["file"]
    return read(path, allow_burned_in=True, xr_max_side=1 << 16, **modalities, **more)


OTHERS = ("NM", "PT", "XA", "MG", "OT", "OP", "XC", "IVUS")


def test_modalities_out_of_scope_are_partitions_where_configured(rows):
    seen = set()
    for row in rows:
        if not row["why"].endswith("(pixels decode)"):
            continue
        items = everything(row)
        expected = NEVER.get(Path(row["file"]).name)
        if expected is not None:
            assert [i.reason for i in items] == [expected], row["file"]
        else:
            assert all(isinstance(i, Frame) and i.modality == row["modality"].lower() for i in items), row[
                "file"
            ]
            seen.add(row["modality"])
    assert seen == set(OTHERS)


def test_a_family_decodes_to_the_same_pixels(rows):
    """Of lossless syntaxes to the very same; of lossy ones to about these."""
    families = defaultdict(list)
    for row in rows:
        family = next((f for f in row["flags"].split(";") if f.startswith("family:")), None)
        if family is not None:
            families[family].append((everything(row)[0], row["file"]))
    sizes = Counter({family: len(members) for family, members in families.items()})
    assert sizes["family:dcm_qa_ts"] == 9 and sizes["family:wg04_NM1"] == 6 and sizes["family:wg04_XA1"] == 5
    compared = 0
    for family, members in families.items():
        exact = [frame for frame, _ in members if not frame.columns["lossy_source"]]
        assert len({pixel_digest(frame.pixels) for frame in exact}) <= 1, family
        reference = (exact or [members[0][0]])[0].pixels.astype(float)
        for frame, name in members:
            error = np.abs(frame.pixels - reference)
            assert error.mean() <= 0.02 * np.ptp(reference), name
            compared += 1
    assert compared == sum(sizes.values())


def decoded(path: Path, row) -> tuple[pydicom.Dataset, np.ndarray]:
    """Data set and frames [n, rows, columns(, 3)] by pydicom, or by the decoder that the manifest names."""
    data = pydicom.dcmread(path)
    if row["decodes_with"] == "imagecodecs.jpeg_decode":
        streams = pydicom.encaps.generate_frames(data.PixelData, number_of_frames=int(row["frames"] or 1))
        pixels = np.stack([imagecodecs.jpeg_decode(stream) for stream in streams])
        return data, pixels.clip(0, 2**data.BitsStored - 1)  # the codestream has 12 bits
    if (
        data.file_meta.TransferSyntaxUID in (JPEGBaseline8Bit, JPEGExtended12Bit)
        and data.SamplesPerPixel == 3
    ):
        # pydicom's luma of the RGB that it converts to is clipped; libjpeg gives the Y of the stream itself.
        streams = list(pydicom.encaps.generate_frames(data.PixelData, number_of_frames=int(row["frames"])))
        if data.PhotometricInterpretation != "RGB" or b"JFIF" in streams[0][:32]:
            return data, np.stack([luma_of_jpeg(stream) for stream in streams])
    pixels = data.pixel_array
    return data, pixels if int(row["frames"] or 1) > 1 else pixels[None]


def luma_of_jpeg(stream: bytes) -> np.ndarray:
    with Image.open(BytesIO(stream)) as image:
        image.draft("L", image.size)
        assert image.mode == "L"
        return np.asarray(image)


def oracle(data: pydicom.Dataset, frame: Frame, raw: np.ndarray) -> tuple[np.ndarray, int]:
    """What the rules of data.md make of a decoded frame, before any crop, and the tolerance (colour: 2)."""
    index, photometric = frame.index, data.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        colours = pydicom.pixels.apply_color_lut(raw, data)
        raw = colours >> 8 if colours.dtype == np.uint16 and colours.max() > 255 else colours
    if raw.ndim == 3:
        return raw[..., :3] @ np.array([0.299, 0.587, 0.114]), 2
    values = raw.astype(float)
    if data.get("ModalityLUTSequence") and data.ModalityLUTSequence[0].get("LUTDescriptor"):
        values = pydicom.pixels.apply_modality_lut(raw, data).astype(float)
    if data.Modality == "CT":
        holder = data
        if "PerFrameFunctionalGroupsSequence" in data:
            groups = (data.PerFrameFunctionalGroupsSequence[index], data.SharedFunctionalGroupsSequence[0])
            found = [g for g in groups if "PixelValueTransformationSequence" in g]
            holder = found[0].PixelValueTransformationSequence[0] if found else data
        slope, intercept = float(holder.get("RescaleSlope", 1) or 1), float(holder.get("RescaleIntercept", 0))
        values = np.rint(values * slope + intercept)
        if "PixelPaddingValue" in data:
            values[raw == np.array(data.PixelPaddingValue).astype(raw.dtype)] = -1024
        return np.clip(values, -1024, 32767), 0
    if photometric == "MONOCHROME1" or data.get("PresentationLUTShape") == "INVERSE":
        values = (-1 if data.PixelRepresentation else 2**data.BitsStored - 1) - values
    return values, 0


def crops(data: pydicom.Dataset, image: np.ndarray) -> list[np.ndarray]:
    """The image itself and, of ultrasound, every region of it."""
    regions = data.get("SequenceOfUltrasoundRegions", []) if data.Modality == "US" else []
    ends = [
        (r.RegionLocationMinY0, r.RegionLocationMaxY1 + 1, r.RegionLocationMinX0, r.RegionLocationMaxX1 + 1)
        for r in regions
    ]
    return [image[top:bottom, left:right] for top, bottom, left, right in ends] or [image]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pixels_are_those_of_pydicom_or_of_the_decoder_that_the_manifest_names(rows):
    wrong, compared, syntaxes = [], 0, set()
    for row in rows:
        accepted = row["expected"] == "ok" or row["why"].endswith("(pixels decode)")
        if not accepted or row["modality"] == "NIfTI" or Path(row["file"]).name in NEVER:
            continue
        data, frames = decoded(DATA / "dicom" / row["file"], row)
        for frame in everything(row, frames_per_cine=3):
            expected, tolerance = oracle(data, frame, frames[frame.index])
            good = any(
                image.shape == frame.pixels.shape and np.abs(image - frame.pixels).max() <= tolerance
                for image in crops(data, expected)
            )
            if not good:
                wrong.append((row["file"], frame.index, row["photometric"], row["transfer_syntax"]))
            compared += 1
            syntaxes.add(row["transfer_syntax"])
    assert not wrong
    assert compared > 170 and len(syntaxes) >= 11


def test_the_range_of_the_manifest_is_that_of_the_stored_values(rows):
    compared = 0
    for row in rows:
        if row["expected"] != "ok" or row["modality"] != "MR" or row["decodes_with"] != "pydicom":
            continue
        frames = [i for i in everything(row, frames_per_cine=1 << 20) if isinstance(i, Frame)]
        if row["photometric"] == "MONOCHROME2" and len(frames) == int(row["frames"]):
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
