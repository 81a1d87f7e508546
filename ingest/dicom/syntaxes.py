"""Transfer syntaxes: which decoder, in the order of measured speed, and the check that all are installed.

Everything decodes to raw samples: no colour conversion, no shifts (see pixels.py). Video is refused.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from ingest.dicom import header
from ingest.dicom.codestream import stream_size
from ingest.dicom.element import PixelElement, Span
from ingest.dicom.header import DEFLATED
from ingest.frames import Refused
from shards.errors import UserError
from shards.schema import Reason

_PREFIX = "1.2.840.10008.1.2"
NATIVE = frozenset({_PREFIX, _PREFIX + ".1", _PREFIX + ".2", DEFLATED})
ENCAPSULATED_NATIVE = _PREFIX + ".1.98"
DEFLATED_FRAMES = _PREFIX + ".8.1"
JPEG_BASELINE, JPEG_EXTENDED = _PREFIX + ".4.50", _PREFIX + ".4.51"
HTJ2K = frozenset(_PREFIX + f".4.20{n}" for n in (1, 2, 3))
JPEG_XL = frozenset(_PREFIX + f".4.11{n}" for n in (0, 1, 2))

# pydicom decoding plugin first tried; the others follow only if it fails. By `medswav bench decoders`, among
# those that check a stream against the header; HTJ2K goes to imagecodecs before (more than twice as fast).
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

# Module, package to install, what it is for.
DECODERS = (
    ("PIL", "pillow", "8-bit JPEG sources; headers of pictures"),
    ("gdcm", "python-gdcm", "JPEG lossless sources"),
    ("jpeg_ls", "pyjpegls", "JPEG-LS sources"),
    ("pylibjpeg", "pylibjpeg", "the two that follow"),
    ("openjpeg", "pylibjpeg-openjpeg", "JPEG 2000 and HTJ2K sources"),
    ("rle", "pylibjpeg-rle", "RLE sources"),
    ("imagecodecs", "imagecodecs", "12-bit JPEG, JPEG XL and TIFF sources; the codec of the shards"),
    ("cv2", "opencv-python-headless", "PNG and JPEG pictures; resizing"),
)


@dataclass(frozen=True)
class DecoderStatus:
    """One package that decoding needs."""

    package: str
    available: bool


def decoder_status() -> list[DecoderStatus]:
    return [DecoderStatus(package, find_spec(module) is not None) for module, package, _ in DECODERS]


def check_decoders() -> None:
    """Raise UserError with the packages to install when a decoder is missing, before any work."""
    missing = [status.package for status in decoder_status() if not status.available]
    if missing:
        raise UserError(f"decoders are missing: run pip install {' '.join(missing)}")


def undecodable() -> list[str]:
    """Names of the encapsulated syntaxes whose plugin of pydicom does not load."""
    return [
        UID(syntax).name
        for syntax, plugin in PREFERRED.items()
        if plugin not in get_decoder(UID(syntax)).available_plugins
    ]


@dataclass(frozen=True)
class Pixels:
    """The pixels of one file: where they lie and how its header describes them (admitted before)."""

    element: PixelElement
    syntax: str
    frames: int
    options: dict[str, Any]  # names and values of pydicom's decoding options

    @property
    def frame_bytes(self) -> int:
        """Bytes of an uncompressed frame; of YBR_FULL_422 as it is packed."""
        o = self.options
        size = o["rows"] * o["columns"] * o["samples_per_pixel"] * o["bits_allocated"] // 8
        return size * 2 // 3 if o["photometric_interpretation"] == "YBR_FULL_422" else size

    def check_whole(self, index: int) -> None:
        """Raise Refused where frame `index` and those after it are not there: of encapsulated ones all."""
        if self.syntax in NATIVE:
            self.element.check_native(index, self.frame_bytes)
        elif not self.codestreams[index:]:
            raise Refused(Reason.BAD_PIXEL_DESCRIPTION)

    def native(self, index: int) -> bytes:
        return self.element.native(index, self.frame_bytes, self.options["bits_allocated"] == 8)

    @cached_property
    def codestreams(self) -> list[list[Span]]:
        """Where the fragments of each encapsulated frame lie. Raises Refused."""
        return self.element.grouped(self.frames)

    def encoded(self, index: int) -> bytes:
        # No lossless codestream is much longer than its samples.
        return self.element.joined(self.codestreams[index], 4 * self.frame_bytes + (1 << 20))


def describe(dataset: Dataset, element: PixelElement, syntax: str, frames: int) -> Pixels:
    """Pixels of an admitted data set."""
    allocated = int(dataset.BitsAllocated)
    options = {
        "rows": int(dataset.Rows),
        "columns": int(dataset.Columns),
        "samples_per_pixel": int(dataset.get("SamplesPerPixel", 1) or 1),
        "photometric_interpretation": header.text(dataset, "PhotometricInterpretation").upper(),
        "bits_allocated": allocated,
        "bits_stored": header.integer(dataset, "BitsStored") or allocated,
        "pixel_representation": header.integer(dataset, "PixelRepresentation") or 0,
        "planar_configuration": header.integer(dataset, "PlanarConfiguration") or 0,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }
    return Pixels(element, syntax, frames, options)


def decode_raw(pixels: Pixels, index: int) -> tuple[NDArray, str]:
    """Raw samples of frame `index`, array [rows, columns] or [rows, columns, 3], and their photometric.

    The photometric is that of the returned samples (a J2K YBR_ICT comes out as RGB). Samples of a JPEG-LS
    or J2K stream whose signedness contradicts the header are made to agree with it; unused bits are left
    alone. Raises Refused for a frame that is cut off, and anything the codecs raise.
    """
    syntax, photometric = pixels.syntax, pixels.options["photometric_interpretation"]
    if syntax in NATIVE:
        return _samples(pixels, pixels.native(index)), photometric
    stream = pixels.encoded(index)
    declared = stream_size(stream)
    if declared is not None and declared != (pixels.options["rows"], pixels.options["columns"]):
        raise Refused(Reason.BAD_PIXEL_DESCRIPTION)  # before a decoder takes memory for it
    own = _own_decoder(pixels, stream)
    if own is not None:
        return own, photometric
    decoder = get_decoder(UID(syntax))
    source = encapsulate([stream], has_bot=False)
    # pydicom's own masking takes HighBit for BitsStored - 1.
    options = pixels.options | {"index": 0, "raw": True, "correct_unused_bits": False}
    plugin = PREFERRED.get(syntax, "")
    with _panics_as_errors():
        try:
            array, meta = decoder.as_array(source, decoding_plugin=plugin, **options)
        except (RuntimeError, ValueError, NotImplementedError):
            if not plugin:
                raise
            array, meta = decoder.as_array(source, **options)
    photometric = str(meta["photometric_interpretation"])
    if syntax in (JPEG_BASELINE, JPEG_EXTENDED) and photometric.startswith("YBR") and array.ndim == 3:
        # With an Adobe marker that says YCbCr, libjpeg has converted already.
        photometric = "RGB" if _adobe_transform(stream) == 1 else photometric
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


def _own_decoder(pixels: Pixels, stream: bytes) -> NDArray | None:
    """Decoders beside pydicom's: 12-bit JPEG, HTJ2K, JPEG XL, deflated and encapsulated native frames."""
    if pixels.syntax == JPEG_EXTENDED and pixels.options["bits_stored"] > 8:
        # The stream has 12 bits: its losses may leave the BitsStored of the image, and must not wrap round.
        return np.minimum(imagecodecs.jpeg_decode(stream), (1 << pixels.options["bits_stored"]) - 1)
    if pixels.syntax in HTJ2K:
        try:
            return np.asarray(imagecodecs.htj2k_decode(stream))
        except imagecodecs.Htj2kError:  # pydicom's plugin may know better
            return None
    if pixels.syntax in JPEG_XL:
        return np.asarray(imagecodecs.jpegxl_decode(stream))
    if pixels.syntax == DEFLATED_FRAMES:
        return _samples(pixels, zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream, pixels.frame_bytes))
    if pixels.syntax == ENCAPSULATED_NATIVE:
        return _samples(pixels, stream)
    return None


def _samples(pixels: Pixels, data: bytes) -> NDArray:
    """Samples of one uncompressed frame, [rows, columns] or [rows, columns, 3], in this machine's order."""
    o = pixels.options
    shape, samples = (o["rows"], o["columns"]), o["samples_per_pixel"]
    order = ">" if pixels.element.big_endian else "<"
    flat = np.frombuffer(data[: pixels.frame_bytes], f"{order}u{o['bits_allocated'] // 8}")
    flat = flat.astype(flat.dtype.newbyteorder("="), copy=False)
    if o["photometric_interpretation"] == "YBR_FULL_422":
        # Two pixels are Y Y Cb Cr (PS3.3 C.7.6.3.1.2).
        packed = flat.reshape(shape[0], shape[1] // 2, 4)
        luma = packed[..., :2].reshape(shape)
        return np.stack([luma, *(np.repeat(packed[..., c], 2, axis=1) for c in (2, 3))], -1)
    if samples == 1:
        return flat.reshape(shape)
    if o["planar_configuration"] == 1:
        return np.moveaxis(flat.reshape(samples, *shape), 0, -1)
    return flat.reshape(*shape, samples)


def _adobe_transform(frame: bytes) -> int | None:
    """The transform byte of an Adobe APP14 segment, if there is one."""
    at = frame.find(b"\xff\xee\x00\x0eAdobe", 0, 4096)
    return frame[at + 15] if at >= 0 and len(frame) > at + 15 else None
