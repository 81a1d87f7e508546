"""Which DICOM files are 2D images for us: SOP class, modality, ImageType, declared pixels. Our own rules."""

from dataclasses import dataclass

from pydicom.dataset import Dataset

from ingest.config import MaskBox, ReadRules
from ingest.dicom import header
from ingest.dicom.geometry import ultrasound_region
from ingest.dicom.syntaxes import SUPPORTED
from ingest.frames import Refused
from ingest.masks import covers_text, matching
from shards.schema import Reason

_STORAGE = "1.2.840.10008.5.1.4.1.1."
DICOMDIR = "1.2.840.10008.1.3.10"

# Standard image storage classes (PS3.4 annex B.5) whose frames are medical 2D images.
IMAGE_CLASSES = frozenset(
    _STORAGE + suffix
    for suffix in (
        "1",  # CR
        "1.1",  # DX for presentation
        "1.2",  # mammography for presentation
        "1.3",  # intra-oral for presentation
        "2",  # CT
        "2.1",  # enhanced CT
        "2.2",  # legacy converted enhanced CT
        "3",  # US multi-frame, retired
        "3.1",  # US multi-frame
        "4",  # MR
        "4.1",  # enhanced MR
        "4.3",  # enhanced MR colour
        "4.4",  # legacy converted enhanced MR
        "6",  # US, retired
        "6.1",  # US
        "6.2",  # enhanced US volume
        "12.1",  # XA
        "12.1.1",  # enhanced XA
        "12.2",  # XRF
        "12.2.1",  # enhanced XRF
        "13.1.1",  # X-ray 3D angiographic
        "13.1.3",  # breast tomosynthesis
        "20",  # NM
        "77.1.5.1",  # ophthalmic photography, 8 bits
        "77.1.5.2",  # ophthalmic photography, 16 bits
        "77.1.5.4",  # ophthalmic tomography
        "128",  # PET
        "128.1",  # legacy converted enhanced PET
        "130",  # enhanced PET
    )
)
# Classes that carry anything, often with text in the pixels.
CAPTURE_CLASSES = frozenset(
    _STORAGE + suffix
    for suffix in ("7", "7.1", "7.2", "7.3", "7.4", "77.1.4", "77.1.4.1", "77.1.1", "77.1.2")
)
# Values of ImageType (PS3.3 C.7.6.1.1.2 and vendors' own) that mean a picture of a screen or a report.
_SCREEN_TYPES = frozenset({"SCREEN SAVE", "SCREEN_SAVE", "SCREENSAVE", "DOSE_INFO", "REPORT", "PROTOCOL"})


@dataclass(frozen=True)
class Admitted:
    """What is known of a file before its pixels are decoded."""

    modality: str  # partition
    code: str  # Modality (0008,0060)
    sop_class: str | None  # None: a private class
    rows: int
    columns: int
    frames: int
    samples: int
    boxes: tuple[MaskBox, ...] = ()  # of known text, that apply to its frames


def admit_class(dataset: Dataset, rules: ReadRules) -> tuple[str, str]:
    """(partition, Modality code) by SOP class and modality alone. Raises Refused."""
    sop_class = _sop_class(dataset)
    if sop_class == DICOMDIR:
        raise Refused(Reason.DICOMDIR)
    standard = sop_class.startswith("1.2.840.10008.")
    if standard and sop_class not in IMAGE_CLASSES | CAPTURE_CLASSES:
        raise Refused(Reason.SOP_CLASS_OUT_OF_SCOPE)
    code = header.text(dataset, "Modality").upper()
    if not code:
        raise Refused(Reason.NO_MODALITY)
    if code not in rules.modalities:
        raise Refused(Reason.MODALITY_OUT_OF_SCOPE)
    partition = rules.modalities[code]
    if header.text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
        # Raw detector values: another image domain than the one that is read by people.
        raise Refused(Reason.SOP_CLASS_OUT_OF_SCOPE, partition)
    return partition, code


def admit(dataset: Dataset, syntax: str, pixels: str, rules: ReadRules) -> Admitted:
    """Admit a header. pixels: keyword of the pixel element, "" without. Raises Refused with the reason."""
    partition, code = admit_class(dataset, rules)
    if not pixels:
        raise Refused(Reason.NO_PIXEL_DATA, partition)
    if syntax not in SUPPORTED:
        raise Refused(Reason.TRANSFER_SYNTAX, partition)
    rows, columns, frames, samples = _declared(dataset, partition)
    if pixels != "PixelData":
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION, partition)
    frame_pixels = rows * columns * samples
    if frame_pixels > rules.max_frame_pixels or frame_pixels * frames > rules.max_pixels:
        raise Refused(Reason.TOO_LARGE, partition)
    types = set(header.texts(dataset, "ImageType"))
    palette = header.text(dataset, "PhotometricInterpretation").upper() == "PALETTE COLOR"
    if types & _SCREEN_TYPES or (code == "CT" and ("LOCALIZER" in types or samples > 1 or palette)):
        # A CT localizer is a projection and a colour CT a rendering: neither is a slice in HU.
        raise Refused(Reason.DERIVED, partition)
    if min(rows, columns) < rules.min_side:
        raise Refused(Reason.TOO_SMALL, partition)
    sop_class = _sop_class(dataset)
    maker = header.text(dataset, "Manufacturer")
    boxes = matching(rules.mask_boxes, code, maker, rows, columns)
    kept = rules.allow_burned_in or covers_text(boxes)
    if not kept and _burned_in_risk(dataset, sop_class, code, (rows, columns)):
        raise Refused(Reason.BURNED_IN_RISK, partition)
    known = sop_class if sop_class in IMAGE_CLASSES | CAPTURE_CLASSES else None
    return Admitted(partition, code, known, rows, columns, frames, samples, boxes)


def _sop_class(dataset: Dataset) -> str:
    found = header.text(dataset, "SOPClassUID")
    return found or header.text(getattr(dataset, "file_meta", Dataset()), "MediaStorageSOPClassUID")


def _declared(dataset: Dataset, partition: str) -> tuple[int, int, int, int]:
    """Rows, Columns, NumberOfFrames, SamplesPerPixel, checked before anything is decoded (PS3.3 C.7.6.3)."""
    rows, columns = header.integer(dataset, "Rows"), header.integer(dataset, "Columns")
    samples = header.integer(dataset, "SamplesPerPixel") or 1
    frames = header.integer(dataset, "NumberOfFrames")
    allocated, stored = header.integer(dataset, "BitsAllocated"), header.integer(dataset, "BitsStored")
    representation = header.integer(dataset, "PixelRepresentation") or 0
    high = header.integer(dataset, "HighBit")
    stored = allocated if stored is None else stored
    good = (
        rows is not None
        and columns is not None
        and rows > 0
        and columns > 0
        and samples in (1, 3)
        and (frames is None or frames > 0)
        and allocated in (8, 16)
        and stored is not None
        and 2 <= stored <= allocated
        and representation in (0, 1)
        and (high is None or stored - 1 <= high < allocated)
    )
    if not good or rows is None or columns is None:
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION, partition)
    return rows, columns, frames or 1, samples


def _burned_in_risk(dataset: Dataset, sop_class: str, code: str, size: tuple[int, int]) -> bool:
    """High risk of text in the pixels (PS3.15 E.3.1): captures, ultrasound without regions, or declared.

    A capture may show anything anywhere: no region speaks for it. Else the crop of an ultrasound frame leaves
    its text outside, declared or not, if there is a crop.
    """
    if sop_class in CAPTURE_CLASSES:
        return True
    if code == "US":
        region = ultrasound_region(dataset, *size)
        return region is None or not region.crops(*size)
    return header.text(dataset, "BurnedInAnnotation").upper() == "YES"
