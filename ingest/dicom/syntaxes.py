"""Transfer syntaxes: which decoder, in the order of measured speed, and the check that all are installed.

Everything decodes to raw samples: no colour conversion, no shifts (see pixels.py). Video is refused.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from ingest.dicom.header import DEFLATED
from shards.errors import UserError

_PREFIX = "1.2.840.10008.1.2"
NATIVE = frozenset({_PREFIX, _PREFIX + ".1", _PREFIX + ".2", DEFLATED})
ENCAPSULATED_NATIVE = _PREFIX + ".1.98"
DEFLATED_FRAMES = _PREFIX + ".8.1"
JPEG_BASELINE, JPEG_EXTENDED = _PREFIX + ".4.50", _PREFIX + ".4.51"
JPEG_XL = frozenset(_PREFIX + f".4.11{n}" for n in (0, 1, 2))

# pydicom decoding plugin first tried; the others follow only if it fails.
PREFERRED = {
    JPEG_BASELINE: "pillow",
    JPEG_EXTENDED: "pillow",
    _PREFIX + ".4.57": "gdcm",
    _PREFIX + ".4.70": "gdcm",
    _PREFIX + ".4.80": "pyjpegls",
    _PREFIX + ".4.81": "pyjpegls",
    _PREFIX + ".4.90": "pylibjpeg",
    _PREFIX + ".4.91": "pylibjpeg",
    _PREFIX + ".4.201": "pylibjpeg",
    _PREFIX + ".4.202": "pylibjpeg",
    _PREFIX + ".4.203": "pylibjpeg",
    _PREFIX + ".5": "pylibjpeg",
}
SUPPORTED = NATIVE | PREFERRED.keys() | JPEG_XL | {ENCAPSULATED_NATIVE, DEFLATED_FRAMES}
# May be lossy: the syntax alone does not say so for the ones that carry both.
LOSSY = frozenset(_PREFIX + f".4.{n}" for n in (50, 51, 81, 91, 203, 112))

# Module -> package, in the order of PREFERRED.
_MODULES = {
    "PIL": "pillow",
    "gdcm": "python-gdcm",
    "jpeg_ls": "pyjpegls",
    "pylibjpeg": "pylibjpeg",
    "openjpeg": "pylibjpeg-openjpeg",
    "rle": "pylibjpeg-rle",
    "imagecodecs": "imagecodecs",
    "cv2": "opencv-python-headless",
}


@dataclass(frozen=True)
class DecoderStatus:
    """One package that decoding needs."""

    package: str
    available: bool


def decoder_status() -> list[DecoderStatus]:
    return [DecoderStatus(package, find_spec(module) is not None) for module, package in _MODULES.items()]


def check_decoders() -> None:
    """Raise UserError with the packages to install when a decoder is missing, before any work."""
    missing = [status.package for status in decoder_status() if not status.available]
    if missing:
        raise UserError(f"decoders are missing: run pip install {' '.join(missing)}")


def is_truncated(dataset: Dataset, syntax: str, index: int) -> bool:
    """Whether an uncompressed file ends before its frame `index` does."""
    if syntax not in NATIVE:
        return False
    size = _frame_size(dataset)
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        size = size * 2 // 3
    return len(dataset.PixelData) < (index + 1) * size


def decode_raw(dataset: Dataset, syntax: str, index: int, frames: int) -> tuple[NDArray, str]:
    """Raw samples of frame `index`, array [rows, columns] or [rows, columns, 3], and their photometric.

    The photometric is that of the returned samples (a J2K YBR_ICT comes out as RGB). Samples of a JPEG-LS
    or J2K stream whose signedness contradicts the header are made to agree with it; unused bits are left
    alone. Raises anything the codecs raise.
    """
    own = _own_decoder(dataset, syntax, index, frames)
    if own is not None:
        return own, str(dataset.PhotometricInterpretation)
    decoder = get_decoder(UID(syntax if syntax != DEFLATED else _PREFIX + ".1"))
    # pydicom's own masking takes HighBit for BitsStored - 1.
    options: dict[str, Any] = {"index": index, "raw": True, "correct_unused_bits": False}
    plugin = PREFERRED.get(syntax, "")
    with _panics_as_errors():
        try:
            array, meta = decoder.as_array(dataset, decoding_plugin=plugin, **options)
        except (RuntimeError, ValueError, NotImplementedError):
            if not plugin:
                raise
            array, meta = decoder.as_array(dataset, **options)
    photometric = str(meta["photometric_interpretation"])
    if syntax in (JPEG_BASELINE, JPEG_EXTENDED) and photometric.startswith("YBR") and array.ndim == 3:
        # With an Adobe marker that says YCbCr, libjpeg has converted already.
        photometric = "RGB" if _adobe_transform(_frame_bytes(dataset, index, frames)) == 1 else photometric
    return array, photometric


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of a codec written in Rust is no Exception: make it one."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__.startswith("pyo3"):
            raise RuntimeError("the decoder panicked") from None
        raise


def _own_decoder(dataset: Dataset, syntax: str, index: int, frames: int) -> NDArray | None:
    """Decoders beside pydicom's: 12-bit JPEG, JPEG XL, deflated frames, encapsulated native frames."""
    decode: Callable[[bytes], NDArray]
    if syntax == JPEG_EXTENDED and dataset.BitsStored > 8:
        decode = imagecodecs.jpeg_decode
    elif syntax in JPEG_XL:
        decode = imagecodecs.jpegxl_decode
    elif syntax == DEFLATED_FRAMES:
        size = _frame_size(dataset)
        return _native(
            dataset,
            zlib.decompressobj(-zlib.MAX_WBITS).decompress(_frame_bytes(dataset, index, frames), size),
        )
    elif syntax == ENCAPSULATED_NATIVE:
        return _native(dataset, _frame_bytes(dataset, index, frames))
    else:
        return None
    return np.asarray(decode(_frame_bytes(dataset, index, frames)))


def _frame_bytes(dataset: Dataset, index: int, frames: int) -> bytes:
    return get_frame(dataset.PixelData, index, number_of_frames=frames)


def _frame_size(dataset: Dataset) -> int:
    samples = int(dataset.get("SamplesPerPixel", 1))
    return int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated) // 8


def _native(dataset: Dataset, data: bytes) -> NDArray:
    """Little endian samples of one uncompressed frame."""
    samples, shape = int(dataset.get("SamplesPerPixel", 1)), (int(dataset.Rows), int(dataset.Columns))
    flat = np.frombuffer(data[: _frame_size(dataset)], f"<u{int(dataset.BitsAllocated) // 8}")
    if samples == 1:
        return flat.reshape(shape)
    if int(dataset.get("PlanarConfiguration", 0)) == 1:
        return np.moveaxis(flat.reshape(samples, *shape), 0, -1)
    return flat.reshape(*shape, samples)


def _adobe_transform(frame: bytes) -> int | None:
    """The transform byte of an Adobe APP14 segment, if there is one."""
    at = frame.find(b"\xff\xee\x00\x0eAdobe", 0, 4096)
    return frame[at + 15] if at >= 0 and len(frame) > at + 15 else None
