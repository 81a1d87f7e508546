"""PNG, JPEG and TIFF images that a table lists: 8 and 16 bits kept, colour to luma."""

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ingest.config import ReadRules
from ingest.frames import Frame, Refused
from ingest.values import check_pixels, limited
from shards.schema import Reason, Row

_PHOTOMETRIC = 262  # the TIFF tag


def read_raster(path: str, modality: str, rules: ReadRules) -> Frame:
    """The one image of a file (of several pages the first). Raises Refused."""
    white_is_zero = _check_header(path, modality, rules)
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
    gray, was_color = _gray(pixels, "RGB" if data[:2] in (b"II", b"MM") else "BGR", modality)
    if white_is_zero:
        gray = np.iinfo(gray.dtype).max - gray
    columns: Row = {
        "original_rows": gray.shape[0],
        "original_columns": gray.shape[1],
        "bits_stored": 8 * gray.dtype.itemsize,
        "inverted": white_is_zero,
        "was_color": was_color,
        "lossy_source": data[:3] == b"\xff\xd8\xff",
    }
    if modality == "xr":
        gray, _ = limited(gray, {}, rules.xr_max_side)
    try:
        check_pixels(gray, rules.min_side)
    except Refused as refused:
        raise Refused(refused.reason, modality) from None
    return Frame(0, modality, gray, columns)


def _check_header(path: str, modality: str, rules: ReadRules) -> bool:
    """Hold the declared size to the limit before anything is decoded; whether a TIFF has WhiteIsZero.

    Decoders leave WhiteIsZero (TIFF 6.0, PhotometricInterpretation 0) as it is: the user turns it.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
            width, height = image.size
            tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
            white_is_zero = tags.get(_PHOTOMETRIC) == 0
    except Image.DecompressionBombError:
        raise Refused(Reason.TOO_LARGE, modality) from None
    except Exception:  # noqa: BLE001 - as above
        raise Refused(Reason.UNREADABLE, modality) from None
    if width * height > rules.max_frame_pixels:
        raise Refused(Reason.TOO_LARGE, modality)
    return white_is_zero


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
