"""PNG, JPEG and TIFF images that a table lists: 8 and 16 bits kept, colour to luma."""

from dataclasses import dataclass

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ingest.config import ReadRules
from ingest.frames import Frame, Refused
from ingest.values import check_pixels, limited
from shards.schema import Reason, Row

# TIFF 6.0: tags and values.
_COMPRESSION, _PHOTOMETRIC, _PLANAR, _COLOR_MAP = 259, 262, 284, 320
_WHITE_IS_ZERO, _PALETTE, _PLANES, _JPEGS = 0, 3, 2, (6, 7)


@dataclass(frozen=True)
class _Tags:
    """What of a TIFF the decoder leaves to us. palette: uint8 [entries, 3]. planes: colours lie apart."""

    white_is_zero: bool = False
    palette: NDArray | None = None
    planes: bool = False
    lossy: bool = False


def read_raster(path: str, modality: str, rules: ReadRules) -> Frame:
    """The one image of a file (of several pages the first). Raises Refused."""
    tags = _check_header(path, modality, rules)
    with open(path, "rb") as file:
        data = file.read()
    try:
        # TIFF through imagecodecs: OpenCV would print its warnings and turns some 16-bit files to 8 bits.
        pixels = (
            imagecodecs.tiff_decode(data)
            if data[:2] in (b"II", b"MM")
            else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR)
        )
    except Exception:  # noqa: BLE001 - codecs raise anything on damaged data; their texts may hold PHI
        raise Refused(Reason.DECODE_FAILED, modality) from None
    if pixels is None:
        raise Refused(Reason.DECODE_FAILED, modality)
    if tags.palette is not None and pixels.ndim == 2:
        pixels = tags.palette[np.minimum(pixels, len(tags.palette) - 1)]
    if tags.planes and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    gray, was_color = _gray(pixels, "RGB" if data[:2] in (b"II", b"MM") else "BGR", modality)
    if tags.white_is_zero:
        gray = np.iinfo(gray.dtype).max - gray
    columns: Row = {
        "original_rows": gray.shape[0],
        "original_columns": gray.shape[1],
        "bits_stored": 8 * gray.dtype.itemsize,
        "inverted": tags.white_is_zero,
        "was_color": was_color,
        "lossy_source": tags.lossy or data[:3] == b"\xff\xd8\xff",
    }
    if modality == "xr":
        gray, _ = limited(gray, {}, rules.xr_max_side)
    try:
        check_pixels(gray, rules.min_side)
    except Refused as refused:
        raise Refused(refused.reason, modality) from None
    return Frame(0, modality, gray, columns)


def _check_header(path: str, modality: str, rules: ReadRules) -> _Tags:
    """Hold the declared size to the limit before anything is decoded. Raises Refused."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            width, height = image.size
            found = _tags(image.tag_v2) if isinstance(image, TiffImagePlugin.TiffImageFile) else _Tags()
    except Image.DecompressionBombError:
        raise Refused(Reason.TOO_LARGE, modality) from None
    except Exception:  # noqa: BLE001 - as above
        raise Refused(Reason.UNREADABLE, modality) from None
    if width * height > rules.max_frame_pixels:
        raise Refused(Reason.TOO_LARGE, modality)
    return found


def _tags(tags: TiffImagePlugin.ImageFileDirectory_v2) -> _Tags:
    photometric = tags.get(_PHOTOMETRIC)
    palette = None
    if photometric == _PALETTE:  # all reds, greens, blues, of 16 bits each
        palette = (np.array(tags[_COLOR_MAP], np.uint16).reshape(3, -1).T >> 8).astype(np.uint8)
    return _Tags(
        photometric == _WHITE_IS_ZERO,
        palette,
        tags.get(_PLANAR) == _PLANES,
        tags.get(_COMPRESSION) in _JPEGS,
    )


def _gray(pixels: NDArray, order: str, modality: str) -> tuple[NDArray, bool]:
    """[rows, columns] of uint8 or uint16, and whether it was colour: three equal channels are grey."""
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype not in (np.uint8, np.uint16):
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION, modality)
    if pixels.ndim == 4 or (pixels.ndim == 3 and pixels.shape[-1] not in (2, 3, 4)):
        pixels = pixels[0]
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels), False
    if pixels.ndim != 3:
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION, modality)
    if pixels.shape[-1] == 2:  # grey with alpha
        return np.ascontiguousarray(pixels[..., 0]), False
    colours = np.ascontiguousarray(pixels[..., :3])
    if (colours[..., 0] == colours[..., 1]).all() and (colours[..., 1] == colours[..., 2]).all():
        return np.ascontiguousarray(colours[..., 0]), False
    return cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY if order == "RGB" else cv2.COLOR_BGR2GRAY), True
