"""`medswav bench decoders`: the decoder that ingest tries first, against the other candidates, by syntax.

Every candidate decodes the same 512 x 512 frame (12 in 16 bits where the syntax holds them): pydicom's
plugins as ingest calls them, and imagecodecs, which is called without any of their checks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ingest.dicom.syntaxes import HTJ2K, PREFERRED
from ingest.synthetic.syntaxes import encode
from orchestration.bench import Figure, figure, take_turns
from orchestration.bench_images import ct_slice

SIDE = 512
_SYNTAXES = (
    RLELossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    JPEGBaseline8Bit,
)
_DIRECT: dict[UID, Callable[[bytes], Any]] = {
    JPEGLosslessSV1: imagecodecs.ljpeg_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    HTJ2KLossless: imagecodecs.htj2k_decode,
    JPEGBaseline8Bit: imagecodecs.jpeg8_decode,
}


def measure(seconds: float, side: int = SIDE) -> Iterator[Figure]:
    """Decoded megabytes a second of one thread: the decoder first tried, and the fastest of the others."""
    for syntax in _SYNTAXES:
        sides, megabytes = candidates(syntax, side)
        took, turns = take_turns(sides, seconds / len(_SYNTAXES))
        first = "imagecodecs" if syntax in HTJ2K else f"pydicom {PREFERRED[syntax]}"
        rates = {name: megabytes / time for name, time in took.items()}
        others = {name: rate for name, rate in rates.items() if name != first}
        best = max(others, key=lambda name: others[name])
        listed = ", ".join(f"{name} {rate:.0f}" for name, rate in sorted(rates.items(), key=lambda r: -r[1]))
        name = f"decode_{syntax.keyword}"
        detail = f"{side} px CT slice, one thread; MB/s of all: {listed}"
        yield figure(name, rates[first], "MB/s", rates[best], f"{best} (the fastest other)", turns, detail)


def candidates(syntax: UID, side: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Decoders of one frame of the syntax by name, and its decoded size in MB."""
    image = ct_slice(0, side)
    eight = syntax == JPEGBaseline8Bit
    frame = np.clip(image // 8 + 128, 0, 255).astype(np.uint8) if eight else (image + 1024).astype(np.uint16)
    bits = 8 if eight else 12
    stream = (
        bytes(imagecodecs.htj2k_encode(frame, reversible=True))
        if syntax == HTJ2KLossless
        else encode(frame, bits, syntax)
    )
    decoder = get_decoder(syntax)
    options: dict[str, Any] = {
        "rows": side,
        "columns": side,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": 8 * frame.dtype.itemsize,
        "bits_stored": bits,
        "pixel_representation": 0,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
        "index": 0,
        "raw": True,
        "correct_unused_bits": False,
    }
    source = encapsulate([stream], has_bot=False)
    sides: dict[str, Callable[[], Any]] = {
        f"pydicom {plugin}": lambda plugin=plugin: decoder.as_array(  # type: ignore[misc]
            source, decoding_plugin=plugin, **options
        )
        for plugin in decoder.available_plugins
    }
    if syntax in _DIRECT:
        sides["imagecodecs"] = lambda: _DIRECT[syntax](stream)
    return sides, frame.nbytes / 1e6
