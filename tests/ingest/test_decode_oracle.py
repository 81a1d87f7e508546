"""Decoding held to what was encoded and to an independent decoder: syntax x photometric x bits."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
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

from ingest.dicom.syntaxes import SUPPORTED
from ingest.synthetic import syntaxes
from tests.ingest.files import grey, one, read, write

_P = "1.2.840.10008.1.2."
DEPTHS = (("uint8", 8), ("uint16", 10), ("uint16", 12), ("uint16", 16), ("int16", 12), ("int16", 16))


def _as_is(syntax: UID) -> Callable[[np.ndarray, int], bytes]:
    return lambda frame, bits: syntaxes.encode(frame, bits, syntax)


def _words(frame: np.ndarray) -> np.ndarray:
    return frame.view(np.uint16) if frame.dtype == np.int16 else frame


def _j2k_lossy(frame: np.ndarray, bits: int) -> bytes:
    return bytes(
        imagecodecs.jpeg2k_encode(frame, level=60, codecformat="j2k", bitspersample=bits, reversible=False)
    )


def _deflated(frame: np.ndarray, bits: int) -> bytes:
    squeeze = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeeze.compress(frame.tobytes()) + squeeze.flush()


@dataclass(frozen=True)
class Case:
    """uid, and how a frame [H, W] or [H, W, 3] is encoded; None: uncompressed. error: allowed, of 255."""

    uid: str
    encode: Callable[[np.ndarray, int], bytes] | None = None
    depths: tuple[tuple[str, int], ...] = DEPTHS
    colour: bool = True
    error: float = 0
    other: str = ""  # independent plugin of pydicom


CASES = {
    "implicit": Case(ImplicitVRLittleEndian),
    "explicit": Case(ExplicitVRLittleEndian),
    "big_endian": Case(ExplicitVRBigEndian),
    "deflated": Case(DeflatedExplicitVRLittleEndian),
    "encapsulated_native": Case(_P + "1.98", lambda frame, bits: frame.tobytes()),
    "deflated_frames": Case(_P + "8.1", _deflated),
    "rle": Case(RLELossless, _as_is(RLELossless), other="pydicom"),
    "jpeg_baseline": Case(JPEGBaseline8Bit, _as_is(JPEGBaseline8Bit), (("uint8", 8),), error=8, other="gdcm"),
    "jpeg_extended_8": Case(_P + "4.51", _as_is(JPEGBaseline8Bit), (("uint8", 8),), error=8, other="gdcm"),
    "jpeg_extended_12": Case(
        _P + "4.51",
        lambda frame, bits: bytes(imagecodecs.jpeg_encode(frame, level=98, bitspersample=12)),
        (("uint16", 12),),
        colour=False,
        error=4,
    ),
    "jpeg_lossless": Case(_P + "4.57", _as_is(JPEGLosslessSV1), colour=False),
    "jpeg_lossless_sv1": Case(JPEGLosslessSV1, _as_is(JPEGLosslessSV1), colour=False),
    "jpeg_ls": Case(JPEGLSLossless, _as_is(JPEGLSLossless), other="gdcm"),
    "jpeg_ls_near": Case(
        _P + "4.81",
        lambda frame, bits: bytes(imagecodecs.jpegls_encode(frame, level=2)),
        (("uint8", 8), ("uint16", 16)),
        error=2,
        other="gdcm",
    ),
    "jpeg_2000_lossless": Case(JPEG2000Lossless, _as_is(JPEG2000Lossless), other="gdcm"),
    "jpeg_2000": Case(
        _P + "4.91", _j2k_lossy, (("uint8", 8), ("uint16", 12)), colour=False, error=4, other="gdcm"
    ),
    **{
        f"htj2k_{n}": Case(
            _P + f"4.20{n}",
            lambda frame, bits: bytes(imagecodecs.htj2k_encode(frame, reversible=True)),
            other="pylibjpeg",
        )
        for n in (1, 2, 3)
    },
    **{
        f"jpeg_xl_{n}": Case(
            _P + f"4.11{n}",
            lambda frame, bits: bytes(imagecodecs.jpegxl_encode(_words(frame), lossless=True)),
        )
        for n in (0, 2)
    },
}
GREY = [(name, d, b) for name, case in CASES.items() for d, b in case.depths]


def smooth(dtype: str, bits: int, seed: int = 0) -> np.ndarray:
    """A wavy ramp [48, 40] over the whole range: what lossy codecs are made for."""
    y, x = np.mgrid[0:48, 0:40]
    wave = (np.sin(x / 9 + seed) + np.cos(y / 11) + 2) / 4
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype == "int16" else (0, 2**bits - 1)
    return np.rint(low + wave * (high - low)).astype(dtype)


def save(path, pixels, bits, case: Case, photometric="MONOCHROME2", **elements):
    """A file of frames [n, H, W(, 3)] in the syntax of the case."""
    native = case.encode is None
    syntax = UID(case.uid) if native else ExplicitVRLittleEndian
    write(path, pixels, "MR", bits, syntax, photometric, frames=True, **elements)
    if case.encode is not None:
        data = pydicom.dcmread(path)
        # pydicom does not write syntaxes that it does not know: the UID is put in afterwards.
        stand_in = _P + ("4.50" if len(case.uid) < 23 else "4.201")
        data.file_meta.TransferSyntaxUID = stand_in
        data.PixelData = encapsulate([case.encode(frame, bits) for frame in pixels])
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
        if case.uid in (JPEGBaseline8Bit, _P + "4.51") and pixels.ndim == 4:
            data.PhotometricInterpretation = "YBR_FULL"
        data.save_as(path, implicit_vr=False, little_endian=True)
        written, uid = path.read_bytes(), case.uid.ljust(len(stand_in), "\0")
        path.write_bytes(written.replace(stand_in.encode(), uid.encode(), 1))
    return path


def stored(pixels: np.ndarray, bits: int, photometric: str) -> np.ndarray:
    values = pixels.astype(np.int64)
    if photometric == "MONOCHROME1":
        values = (-1 if pixels.dtype == np.int16 else 2**bits - 1) - values
    return values


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("name", "dtype", "bits"), GREY)
def test_grey_frames_are_those_encoded_and_those_of_another_decoder(tmp_path, name, dtype, bits, photometric):
    case = CASES[name]
    make = smooth if case.error else grey
    pixels = np.stack([make(dtype, bits, seed=seed) for seed in range(2)])
    path = save(tmp_path / "f", pixels, bits, case, photometric)
    frames = read(path)
    assert [frame.index for frame in frames] == [0, 1]
    for frame in frames:
        expected = stored(pixels[frame.index], bits, photometric)
        scale = 1 if case.uid.endswith("4.81") else (2**bits - 1) / 255
        assert np.abs(frame.pixels.astype(int) - expected).max() <= case.error * scale
        assert frame.pixels.dtype == dtype
        if case.other:
            theirs = get_decoder(UID(case.uid)).as_array(
                pydicom.dcmread(path), index=frame.index, decoding_plugin=case.other
            )[0]
            theirs = stored(theirs.astype(dtype), bits, photometric)
            assert np.abs(frame.pixels.astype(int) - theirs).max() <= (2 * scale if case.error else 0)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.colour])
def test_colour_frames_become_the_luma_of_what_was_encoded(tmp_path, name, photometric, planar):
    case = CASES[name]
    native = case.encode is None or name in ("encapsulated_native", "deflated_frames")
    lossy = case.error and "ls_near" not in name
    if (planar and not native) or (lossy and photometric != "RGB"):
        pytest.skip("the codestream has one form of colour only")
    make = smooth if case.error else grey
    rgb = np.stack([make("uint8", 8, seed=seed) for seed in range(3)], -1)[None]
    elements = {}
    if planar and case.encode is None:
        elements = {"PlanarConfiguration": 1, "PixelData": np.moveaxis(rgb, -1, 1).tobytes()}
    if planar and case.encode is not None:
        case = Case(case.uid, lambda frame, bits: CASES[name].encode(np.moveaxis(frame, -1, 0), bits))
        elements = {"PlanarConfiguration": 1}
    frame = one(save(tmp_path / "f", rgb, 8, case, photometric, **elements))
    luma = rgb[0] @ np.array([0.299, 0.587, 0.114]) if photometric == "RGB" else rgb[0, ..., 0]
    assert np.abs(frame.pixels.astype(int) - luma).max() <= case.error + (1 if photometric == "RGB" else 0)
    assert frame.columns["was_color"] and frame.pixels.dtype == np.uint8


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.error])
def test_palette_indices_survive_every_lossless_syntax(tmp_path, name):
    table = np.random.default_rng(0).permutation(256).astype(np.uint8)
    elements = {}
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    indices = grey("uint8", 8)
    frame = one(save(tmp_path / "f", indices[None], 8, CASES[name], "PALETTE COLOR", **elements))
    assert np.array_equal(frame.pixels, table[indices])


def test_every_syntax_that_is_promised_is_in_this_oracle():
    # 4.111 is JPEG recompressed as JPEG XL: decoded as its two siblings are.
    assert {case.uid for case in CASES.values()} | {_P + "4.111"} == SUPPORTED
