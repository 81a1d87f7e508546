"""From DICOM to shard: a fixed input under a fixed key gives these bytes, on every machine and in every run.

A digest below changes with the rules, the columns or the format, whose versions change then, and with the
HTJ2K encoder of another imagecodecs: its decoded pixels must be the same all the same.
"""

import hashlib

import imagecodecs
import numpy as np
import pytest

from shards import catalog
from shards.codec import get_codec
from shards.tar import ShardReader
from tests.ingest.files import NAMES, ingest, write

GOLDEN_ROWS = {
    "ct": ["3a2jehauhahvf7szwzopcvcgq4", "du6ej3rl22odfcksa6kt7i6jqo"],
    "mr": ["nqkkevqt2h426ydlkczl4q6xlg", "5mqr4a6r3ioof7d43tc5b2y2mn"],
}
GOLDEN_SHARDS = {
    "ct": "98461b56f06b0525638715922aadd8f663e22a8bef2566146c492abc08d7465e",
    "mr": "bb6545bd468e6eab6f7c98f4c406a5fb20c011c4657ac95a3a42da7ba2ce97a6",
}
ENCODER = "2026.3.6"  # of imagecodecs: deploy/requirements.lock


@pytest.fixture
def made(tmp_path):
    ramp = (np.arange(48 * 40, dtype=np.uint16).reshape(48, 40) * 7) % 4096
    write(
        tmp_path / "source" / "a.dcm",
        ramp,
        "CT",
        number=1,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        PixelSpacing=[0.7, 0.6],
        ImagePositionPatient=[1.0, 2.0, 3.5],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
    )
    write(tmp_path / "source" / "b.dcm", ramp[::-1].copy(), "MR", number=2)
    ingest(tmp_path / "source", tmp_path / "out")
    return tmp_path / "out", ramp


def test_the_pixels_and_rows_of_a_fixed_input_are_these(made):
    out, ramp = made
    reader = ShardReader(out)
    found = {}
    for modality in ("ct", "mr"):
        (row,) = catalog.load(out, modality).to_pylist()
        pixels = get_codec(row["codec"]).decode(
            reader.read(modality, row["shard"], row["offset"], row["size"])
        )
        found[modality] = pixels
        assert row["patient"] == NAMES.id("patient", "P1")
        assert [row["key"], row["pixel_digest"]] == GOLDEN_ROWS[modality]
    reader.close()
    assert np.array_equal(found["ct"], ramp.astype(np.int16) - 1024) and found["ct"].dtype == np.int16
    assert np.array_equal(found["mr"], ramp[::-1])


@pytest.mark.skipif(imagecodecs.__version__ != ENCODER, reason="bytes of another HTJ2K encoder")
def test_the_shards_of_a_fixed_input_are_the_same_byte_for_byte(made):
    shards = sorted(made[0].glob("shards/*/*.tar"))
    assert {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards} == GOLDEN_SHARDS
