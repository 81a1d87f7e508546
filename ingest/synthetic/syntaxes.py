"""Pixels into a data set, in every transfer syntax that the generated folders use."""

from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

NATIVE = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian
)  # fmt: skip
# JPEG lossless holds one component here: imagecodecs encodes no colour with it.
GREY = (*NATIVE, RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1)
COLOR = (*NATIVE, RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit)
LOSSY = frozenset({JPEGBaseline8Bit})


def set_pixels(data: Dataset, frames: NDArray[np.generic], bits: int, syntax: UID, photometric: str) -> None:
    """Write frames [n, H, W] or [n, H, W, 3] (uint8, uint16 or int16) as PixelData, with its description.

    Colour comes as RGB; with photometric YBR_FULL it must already be converted. JPEG baseline converts by
    itself and is then described as YBR_FULL (4:4:4), as the standard asks (PS3.5 8.2.1).
    """
    color = frames.ndim == 4
    data.file_meta.TransferSyntaxUID = syntax
    data.SamplesPerPixel = 3 if color else 1
    data.PhotometricInterpretation = "YBR_FULL" if color and syntax in LOSSY else photometric
    if color:
        data.PlanarConfiguration = 0
    data.Rows, data.Columns = frames.shape[1:3]
    data.BitsAllocated = 8 * frames.dtype.itemsize
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(frames.dtype.kind == "i")
    if len(frames) > 1:
        data.NumberOfFrames = len(frames)
    if syntax in NATIVE:
        raw = (frames.byteswap() if syntax == ExplicitVRBigEndian else frames).tobytes()
        data.add_new(0x7FE00010, "OB" if data.BitsAllocated == 8 else "OW", raw + b"\0" * (len(raw) % 2))
    else:
        data.add_new(0x7FE00010, "OB", encapsulate([encode(f, bits, syntax) for f in frames]))
        data["PixelData"].is_undefined_length = True
    if syntax in LOSSY:
        data.LossyImageCompression, data.LossyImageCompressionMethod = "01", "ISO_10918_1"


def encode(frame: NDArray[np.generic], bits: int, syntax: UID) -> bytes:
    """One frame [H, W] or [H, W, 3] as a codestream of the encapsulated syntax."""
    unsigned = frame.view(np.uint16) if frame.dtype == np.int16 else frame
    if syntax == JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(unsigned))
    if syntax == JPEG2000Lossless:
        return bytes(
            imagecodecs.jpeg2k_encode(
                frame, level=0, codecformat="j2k", bitspersample=bits, mct=False, reversible=True
            )
        )
    if syntax == JPEGLosslessSV1:
        return bytes(imagecodecs.ljpeg_encode(unsigned, bitspersample=bits))
    if syntax == JPEGBaseline8Bit:
        if frame.ndim == 2:
            return bytes(imagecodecs.jpeg8_encode(frame, level=92))
        return bytes(
            imagecodecs.jpeg8_encode(
                frame, level=92, colorspace="rgb", outcolorspace="ycbcr", subsampling="444"
            )
        )
    if syntax == RLELossless:
        return RLELosslessEncoder.encode(
            frame,
            rows=frame.shape[0],
            columns=frame.shape[1],
            samples_per_pixel=1 if frame.ndim == 2 else 3,
            photometric_interpretation="MONOCHROME2" if frame.ndim == 2 else "RGB",
            planar_configuration=0,
            bits_allocated=8 * frame.dtype.itemsize,
            bits_stored=bits,
            pixel_representation=int(frame.dtype.kind == "i"),
            number_of_frames=1,
            encoding_plugin="pylibjpeg",
        )
    raise ValueError(f"no encoder for {syntax.name}")


def save(data: Dataset, path: Path) -> None:
    """Write a Part 10 file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
