"""Raw samples to stored pixels: bits, colour, values, polarity. Rules of data.md section 2."""

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut

from ingest.dicom import header
from ingest.dicom.syntaxes import Pixels, decode_raw
from ingest.frames import Refused
from ingest.values import AIR_HU, HIGHEST_HU
from shards.schema import Reason

_PIXELS_AT_ONCE = 1 << 20  # the steps take up to 12 bytes a pixel, of a large frame more than the frame
_HOUNSFIELD_TYPES = frozenset({"", "HU", "HU_MOD", "US"})


@dataclass(frozen=True)
class Values:
    """How stored values become units: value * slope + intercept (PS3.3 C.11.1); type: of the units, or ""."""

    slope: float | None
    intercept: float | None
    type: str = ""


@dataclass(frozen=True)
class Stored:
    """Pixels at rest and what was done to them."""

    pixels: NDArray  # [rows, columns] uint8 | uint16 | int16
    bits: int  # of the value range of the pixels
    inverted: bool
    was_color: bool


def read_frame(dataset: Dataset, source: Pixels, index: int, code: str, values: Values) -> Stored:
    """Decode frame `index` and bring it to its stored form.

    CT: int16 Hounsfield units, never windowed. All others: stored values, larger = brighter.
    Raises Refused (UNREADABLE: cut off; DERIVED and BAD_PIXEL_DESCRIPTION: see check_hounsfield) and
    whatever the codecs raise.
    """
    if code == "CT":
        check_hounsfield(dataset, values)
    raw, photometric = decode_raw(source, index)
    bits = header.integer(dataset, "BitsStored") or int(dataset.BitsAllocated)
    signed = bool(header.integer(dataset, "PixelRepresentation"))
    high = header.integer(dataset, "HighBit")
    shift = 0 if high is None else max(0, high + 1 - bits)
    if raw.shape[:2] != (int(dataset.Rows), int(dataset.Columns)):
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
    if code == "CT" and photometric == "MONOCHROME2" and _by_table(raw, dataset):
        ends = padding_ends(dataset, signed)
        table = _hounsfield_table(bits, signed, shift, values, ends)
        return Stored(cv2.LUT(np.ascontiguousarray(raw).view(np.uint16), table), 16, False, False)
    step = max(1, _PIXELS_AT_ONCE // raw.shape[1])
    blocks = (raw[top : top + step] for top in range(0, raw.shape[0], step))
    parts = (_stored(dataset, b, photometric, code, values, (bits, signed, shift)) for b in blocks)
    if step >= raw.shape[0]:
        return next(parts)
    pixels: NDArray | None = None
    for number, part in enumerate(parts):
        pixels = np.empty(raw.shape[:2], part.pixels.dtype) if pixels is None else pixels
        pixels[number * step : (number + 1) * step] = part.pixels
    assert pixels is not None
    return replace(part, pixels=pixels)


def _stored(
    dataset: Dataset, raw: NDArray, photometric: str, code: str, values: Values, word: tuple[int, bool, int]
) -> Stored:
    """Some rows of a frame. word: bits, signed, and the bit that they begin at."""
    bits, signed, shift = word
    padding = None
    if raw.ndim == 2:
        words, raw = raw, mask_bits(raw, bits, signed, shift)
        ends = padding_ends(dataset, signed) if code == "CT" else None
        padding = None if ends is None else padding_mask(words, raw, ends, signed)
    gray, was_color = to_gray(raw, photometric, dataset)
    if was_color:
        bits, signed = 8 * gray.dtype.itemsize, False
    if has_modality_lut(dataset) and not was_color:
        gray, bits, signed = _modality_lut(gray, dataset)
        values = Values(None, None)
    if code == "CT":
        return Stored(to_hounsfield(gray, values, padding), 16, False, False)
    inverted = photometric == "MONOCHROME1" or _inverse_lut(dataset)
    if values.slope is not None and values.slope < 0 and not was_color:
        inverted = not inverted  # what is shown is value * slope (PS3.3 C.11.1): the larger, the darker
    if inverted:
        gray = invert(gray, bits, signed)
    return Stored(_narrow(gray, bits, signed), bits, inverted, was_color)


def mask_bits(raw: NDArray, bits: int, signed: bool, shift: int = 0) -> NDArray:
    """Keep `bits` bits from bit `shift` on and sign-extend: int32 [rows, columns].

    Takes out overlay bits (PS3.5 8.1.2), and the wrong signedness that some codecs give.
    """
    wide = raw.astype(np.int32) >> shift if shift else raw.astype(np.int32)
    wide &= (1 << bits) - 1
    if signed:
        half = 1 << (bits - 1)
        wide = (wide ^ half) - half
    return wide


def to_gray(raw: NDArray, photometric: str, dataset: Dataset) -> tuple[NDArray, bool]:
    """(array [rows, columns], whether it was colour). Luma of ITU-R BT.601; of YBR the first channel."""
    if photometric == "PALETTE COLOR":
        return palette_luma(raw, dataset), True
    if raw.ndim == 2:
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
        return raw, False
    if photometric.startswith("YBR_FULL"):
        return np.ascontiguousarray(raw[..., 0]), True
    if photometric in ("RGB", "YBR_ICT", "YBR_RCT") and raw.shape[-1] == 3:
        return cv2.cvtColor(raw.astype(f"u{raw.dtype.itemsize}"), cv2.COLOR_RGB2GRAY), True
    raise Refused(Reason.BAD_PIXEL_DESCRIPTION)


def palette_luma(indices: NDArray, dataset: Dataset) -> NDArray:
    """Luma of a palette image (PS3.3 C.7.9), uint8: the palette is converted, not the pixels.

    Of 16-bit palette entries the high byte is taken, as displays do; some writers fill the low byte only.
    """
    descriptor = header.value(dataset, "RedPaletteColorLookupTableDescriptor")
    entries = int(descriptor[0]) or 1 << 16
    start = int(descriptor[1])
    every = np.arange(start, start + entries, dtype=np.int32)[None]
    colours = np.ascontiguousarray(apply_color_lut(every, dataset)[..., :3])
    luma = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[0]
    if luma.dtype == np.uint16 and luma.max() > 255:
        luma >>= 8
    return luma.astype(np.uint8)[np.clip(indices - start, 0, entries - 1)]


def check_hounsfield(dataset: Dataset, values: Values) -> None:
    """Raise Refused for a CT image whose values are not HU; decided before it is decoded.

    DERIVED: a RescaleType or ModalityLUTType (PS3.3 C.11.1.1.2) that names another unit (MGML, Z_EFF, ED).
    None, and US (unspecified), mean HU in CT. BAD_PIXEL_DESCRIPTION: neither slope, intercept nor Modality
    LUT and unsigned pixels, whose zero may lie anywhere. Signed ones are taken as HU themselves.
    """
    lut = _usable_lut(dataset)
    unit = header.text(lut, "ModalityLUTType").upper() if lut is not None else values.type
    if unit not in _HOUNSFIELD_TYPES:
        raise Refused(Reason.DERIVED)
    mapped = lut is not None or values.slope is not None or values.intercept is not None
    if not mapped and not header.integer(dataset, "PixelRepresentation"):
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)


def _by_table(raw: NDArray, dataset: Dataset) -> bool:
    """Whether to look pixels up: those of 16 bits, and more of them than the table has entries."""
    large = raw.ndim == 2 and raw.dtype.itemsize == 2 and raw.size >= 1 << 16
    return large and not has_modality_lut(dataset) and _cv2_looks_up_words()


@lru_cache(maxsize=1)
def _cv2_looks_up_words() -> bool:
    """Whether this OpenCV has LUT for 16-bit indices; older ones know only those of 8 bits."""
    table = np.arange(1 << 16, dtype=np.uint16).view(np.int16)[None]
    try:
        return np.array_equal(cv2.LUT(table.view(np.uint16), table), table)
    except cv2.error:
        return False


@lru_cache(maxsize=4)  # 128 kB each; the slices of a series have the same
def _hounsfield_table(
    bits: int, signed: bool, shift: int, values: Values, ends: tuple[int, int] | None
) -> NDArray:
    """int16 HU [1, 65536] of every 16-bit word: what the steps below make of an image of all of them."""
    words = np.arange(1 << 16, dtype=np.uint16)[None]
    gray = mask_bits(words, bits, signed, shift)
    padding = None if ends is None else padding_mask(words, gray, ends, signed)
    return to_hounsfield(gray, values, padding)


def padding_ends(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue and PixelPaddingRangeLimit in order (PS3.3 C.7.5.1.1.2); None without padding."""
    value = header.integer(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = header.integer(dataset, "PixelPaddingRangeLimit")
    # The element is often written with the other signedness: compare as the pixels are.
    low, high = sorted(_as_stored(v, signed) for v in (value, value if limit is None else limit))
    return low, high


def padding_mask(words: NDArray, gray: NDArray, ends: tuple[int, int], signed: bool) -> NDArray:
    """Where pixels lie between padding_ends, both included: bool [rows, columns].

    words: as decoded; gray: of their BitsStored bits. Padding may use bits beyond those (63536 of 12 bits),
    and overlay bits may lie beside it: either match counts.
    """
    whole = mask_bits(words, 16, signed)
    return ((gray >= ends[0]) & (gray <= ends[1])) | ((whole >= ends[0]) & (whole <= ends[1]))


def to_hounsfield(gray: NDArray, values: Values, padding: NDArray | None) -> NDArray:
    """int16 HU [rows, columns], padding and everything below air (-2000, -3024: GE corners) at -1024."""
    slope = 1.0 if values.slope is None else values.slope
    intercept = 0.0 if values.intercept is None else values.intercept
    if slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**15:
        units: NDArray = gray.astype(np.int32)
        if slope != 1:
            units *= int(slope)
        units += int(intercept)
    else:
        units = np.rint(gray.astype(np.float64) * slope + intercept)
    if padding is not None:
        units[padding] = AIR_HU
    return np.clip(units, AIR_HU, HIGHEST_HU, out=units).astype(np.int16)


def invert(gray: NDArray, bits: int, signed: bool) -> NDArray:
    """Mirror the value range of `bits` bits: smallest <-> largest."""
    return (-1 if signed else (1 << bits) - 1) - gray.astype(np.int32)


def mirrored(value: float, bits: int, signed: bool) -> float:
    """Where `invert` puts a value (for window centres)."""
    return (-1 if signed else (1 << bits) - 1) - value


def _narrow(gray: NDArray, bits: int, signed: bool) -> NDArray:
    if signed:
        return gray.astype(np.int16)
    return gray.astype(np.uint8 if bits <= 8 else np.uint16)


def _as_stored(value: int, signed: bool) -> int:
    if signed:
        return (value & 0xFFFF ^ 0x8000) - 0x8000 if value > 0x7FFF else value
    return value & 0xFFFF


def _modality_lut(gray: NDArray, dataset: Dataset) -> tuple[NDArray, int, bool]:
    """(values, bits, signed) after the Modality LUT (PS3.3 C.11.1.1)."""
    lut = header.items(dataset, "ModalityLUTSequence")[0]
    entries = int(lut.LUTDescriptor[0]) or 1 << 16
    start = int(lut.LUTDescriptor[1])
    every = np.arange(start, start + entries, dtype=np.int32)
    table = apply_modality_lut(every, dataset).astype(np.int32)
    # The range that the table uses: many declare 16 bits for 10.
    bits = max(2, int(table.max()).bit_length())
    if bits > 16 or table.min() < 0:
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)
    return table[np.clip(gray - start, 0, entries - 1)], bits, False


def has_modality_lut(dataset: Dataset) -> bool:
    """Whether there is a Modality LUT; an empty sequence and an item without values are none."""
    return _usable_lut(dataset) is not None


def _usable_lut(dataset: Dataset) -> Dataset | None:
    lut = header.item(dataset, "ModalityLUTSequence")
    if lut is None or header.value(lut, "LUTDescriptor") is None or header.value(lut, "LUTData") is None:
        return None
    return lut


def _inverse_lut(dataset: Dataset) -> bool:
    return header.text(dataset, "PresentationLUTShape").upper() == "INVERSE"
