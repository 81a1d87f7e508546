"""One DICOM file to frames: admit > decode > crop > describe. Runs inside the decoder process."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from ingest.config import ReadRules
from ingest.dicom import header
from ingest.dicom.admit import Admitted, admit
from ingest.dicom.geometry import frame_geometry, group_item, is_enhanced, ultrasound_region
from ingest.dicom.pixels import Stored, Values, has_modality_lut, read_frame
from ingest.dicom.stack import stack_of
from ingest.dicom.syntaxes import LOSSY, Pixels, describe
from ingest.dicom.window import window
from ingest.frames import Frame, Item, Refusal, Refused
from ingest.masks import blanked, covers_text
from ingest.values import check_pixels, limited, spread
from shards.schema import Reason, Row

_PHOTOMETRICS = frozenset(
    {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"}
)


@dataclass(frozen=True)
class _Source:
    """One opened and admitted file."""

    dataset: Dataset
    pixels: Pixels
    facts: Admitted
    rules: ReadRules


def read_dicom(path: str, rules: ReadRules) -> Iterator[Item]:
    """Frames and refusals of one file. Raises Refused for the whole file.

    Only the frame at hand is in memory, whatever the file holds; a deflated file is inflated to a limit.
    """
    with open(path, "rb") as file:
        dataset, syntax, element = header.open_image(file, limit=4 * rules.max_frame_pixels)
        facts = admit(dataset, syntax, "" if element is None else element.keyword, rules)
        assert element is not None  # admitted
        pixels = describe(dataset, element, syntax, facts.frames)
        yield from _frames(_Source(dataset, pixels, facts, rules))


def _frames(source: _Source) -> Iterator[Item]:
    dataset, frames = source.dataset, source.facts.frames
    texts, identifiers = _texts(dataset), _identifiers(dataset)
    # The frames of an enhanced object are slices, all wanted; those of a cine are much alike.
    every = range(frames) if is_enhanced(dataset) else spread(frames, source.rules.frames_per_cine)
    for index in every:
        try:
            source.pixels.check_whole(index)
        except Refused as refused:
            # One refusal for all that is missing: a header may declare millions of frames.
            yield Refusal(refused.reason, index if index else -1, source.facts.modality)
            return
        try:
            yield _frame(source, index, texts, identifiers)
        except Refused as refused:
            yield Refusal(refused.reason, index if frames > 1 else -1, source.facts.modality)


def _frame(source: _Source, index: int, texts: dict[str, str], identifiers: dict[str, str]) -> Frame:
    dataset, facts, rules = source.dataset, source.facts, source.rules
    values = _values(dataset, index)
    try:
        stored = read_frame(dataset, source.pixels, index, facts.code, values)
    except (Refused, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - the codecs raise anything on damaged data; their texts may hold PHI
        raise Refused(Reason.DECODE_FAILED) from None
    stored = replace(stored, pixels=blanked(stored.pixels, facts.boxes, facts.code))
    geometry = frame_geometry(dataset, index)
    pixels = stored.pixels
    if facts.code == "US":
        pixels, geometry = _cropped(source, pixels, geometry)
    elif facts.modality == "xr":
        pixels, geometry = limited(pixels, geometry, rules.xr_max_side)
    check_pixels(pixels, rules.min_side)
    columns = geometry | window(dataset, index, facts.code, stored, values) | _acquisition(dataset, index)
    columns |= _source_columns(source, stored, values)
    # A reduced X-ray no longer has the pixels that its position is of.
    wanted = "volumes" in rules.outputs and facts.modality != "xr" and bool(identifiers["series"])
    stack = stack_of(dataset, index, facts.frames) if wanted else None
    return Frame(index, facts.modality, pixels, columns, identifiers, texts, stack)


def _source_columns(source: _Source, stored: Stored, values: Values) -> Row:
    dataset = source.dataset
    photometric = header.text(dataset, "PhotometricInterpretation").upper()
    declared_lossy = header.text(dataset, "LossyImageCompression") == "01"
    has_lut = has_modality_lut(dataset)
    return {
        "original_rows": source.facts.rows,
        "original_columns": source.facts.columns,
        "bits_stored": header.integer(dataset, "BitsStored"),
        "photometric": photometric if photometric in _PHOTOMETRICS else None,
        "inverted": stored.inverted,
        "was_color": stored.was_color,
        "lossy_source": source.pixels.syntax in LOSSY or declared_lossy,
        "rescale_slope": None if has_lut else values.slope,
        "rescale_intercept": None if has_lut else values.intercept,
        "sop_class": source.facts.sop_class,
        "transfer_syntax": source.pixels.syntax,
    }


def _cropped(source: _Source, pixels: NDArray, geometry: Row) -> tuple[NDArray, Row]:
    region = ultrasound_region(source.dataset, *pixels.shape)
    if region is None:
        if not source.rules.allow_burned_in and not covers_text(source.facts.boxes):
            raise Refused(Reason.BURNED_IN_RISK)
        return pixels, geometry
    cropped = np.ascontiguousarray(pixels[region.top : region.bottom, region.left : region.right])
    geometry = geometry | {"crop_top": region.top, "crop_left": region.left}
    found = {"spacing_row_mm": region.spacing_row_mm, "spacing_column_mm": region.spacing_column_mm}
    return cropped, geometry | {name: value for name, value in found.items() if value is not None}


def _values(dataset: Dataset, index: int) -> Values:
    holder = group_item(dataset, index, "PixelValueTransformationSequence") or dataset
    slope = header.number(holder, "RescaleSlope")
    # A slope of 0 would make every image blank: writers mean "none".
    unit = header.text(holder, "RescaleType").upper()
    return Values(slope or None, header.number(holder, "RescaleIntercept"), unit)


def _acquisition(dataset: Dataset, index: int) -> Row:
    echo = group_item(dataset, index, "MREchoSequence")
    timing = group_item(dataset, index, "MRTimingAndRelatedParametersSequence") or dataset
    echo_time = header.number(echo, "EffectiveEchoTime") if echo is not None else None
    return {
        "kvp": header.number(dataset, "KVP"),
        "field_strength_t": header.number(dataset, "MagneticFieldStrength"),
        "echo_time_ms": echo_time if echo_time is not None else header.number(dataset, "EchoTime"),
        "repetition_time_ms": header.number(timing, "RepetitionTime"),
        "echo_number": header.integer(dataset, "EchoNumbers"),
    }


def _identifiers(dataset: Dataset) -> dict[str, str]:
    keywords = {
        "patient": "PatientID",
        "study": "StudyInstanceUID",
        "series": "SeriesInstanceUID",
        "instance": "SOPInstanceUID",
        "frame_of_reference": "FrameOfReferenceUID",
        "accession": "AccessionNumber",
    }
    return {name: header.text(dataset, keyword) for name, keyword in keywords.items()}


def _texts(dataset: Dataset) -> dict[str, str]:
    keywords = {
        "manufacturer": "Manufacturer",
        "body_part": "BodyPartExamined",
        "view_position": "ViewPosition",
        "laterality": "ImageLaterality",
        "sex": "PatientSex",
        "age": "PatientAge",
        "birth_date": "PatientBirthDate",
        "study_date": "StudyDate",
    }
    texts = {name: header.text(dataset, keyword) for name, keyword in keywords.items()}
    texts["laterality"] = texts["laterality"] or header.text(dataset, "Laterality")
    return texts
