"""What a JPEG or JPEG 2000 codestream says of its size, before a decoder believes it."""

import struct

_SOI, _SOC = b"\xff\xd8", b"\xff\x4f\xff\x51"
# SOF0 to SOF15 without DHT, JPG and DAC (ISO/IEC 10918-1 table B.1), and SOF55 of JPEG-LS (ISO/IEC 14495-1).
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST, SOI: markers without a segment
_SIZ = struct.Struct(">IIII")


def stream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the header of a codestream; None where it is of another kind or cut off.

    None too for a JPEG that leaves the number of lines to a later marker (0, ISO/IEC 10918-1 B.2.5).
    """
    try:
        if stream.startswith(_SOI):
            return _jpeg(stream)
        at = stream.find(_SOC, 0, 1 << 16)  # of JP2 behind boxes
        if at < 0:
            return None
        # After SOC, SIZ, its length and capabilities (ISO/IEC 15444-1 A.5.1).
        width, height, left, top = _SIZ.unpack_from(stream, at + 8)
        return height - top, width - left
    except struct.error:
        return None


def _jpeg(stream: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF or marker in _ALONE:  # fill bytes may stand before a marker
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            rows, columns = struct.unpack_from(">HH", stream, at + 5)
            return (rows, columns) if rows else None
        at += 2 + int(struct.unpack_from(">H", stream, at + 2)[0])
    return None
