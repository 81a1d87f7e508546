"""Pseudonyms are stable, keyed, unambiguous; splits never move; keys are handled safely."""

import base64
import hashlib
import re

import pytest

from shards.errors import UserError
from shards.ids import Pseudonymizer, create_key, digest, frame, load_key

KEY = bytes(range(32))
ID = re.compile(r"[a-z2-7]{26}")


def test_golden_values_hold_over_versions():
    p = Pseudonymizer(KEY, "north")
    assert p.id("patient", "4711") == "klq443trp3izmpupja7wa7d776"
    assert p.key_id == "ouuyawm4qove"
    assert digest("a", b"b") == "hsovsecfxsehn6oqhgn37mc4nj"
    assert "".join(p.split(p.id("patient", str(n)))[1] for n in range(24)) == "rrrrrrrrrarrarrrrrrrrarr"


@pytest.mark.parametrize("value", ["", "4711", "1.2.840.113619", "Müller^Änne", "a" * 1000])
def test_an_id_is_26_base32_characters_without_dots(value):
    assert ID.fullmatch(Pseudonymizer(KEY).id("patient", value))


def test_ids_are_lower_case_base32_of_rfc_4648():
    for number in range(200):
        raw = hashlib.sha256(frame(str(number))).digest()
        assert digest(str(number)) == base64.b32encode(raw).decode().lower()[:26]


def test_key_site_kind_and_value_each_change_the_id():
    ids = {
        Pseudonymizer(key, site).id(kind, value)
        for key in (KEY, KEY[::-1])
        for site in ("", "north")
        for kind in ("patient", "study")
        for value in ("1", "2")
    }
    assert len(ids) == 16


def test_parts_cannot_be_shifted_into_each_other():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert Pseudonymizer(KEY, "a").id("b", "c") != Pseudonymizer(KEY, "ab").id("", "c")


def test_the_key_is_not_printed():
    assert KEY.hex() not in repr(Pseudonymizer(KEY)) and repr(KEY) not in repr(Pseudonymizer(KEY))


def test_the_split_depends_on_the_patient_alone_and_has_the_fractions():
    p = Pseudonymizer(KEY)
    patients = [p.id("patient", str(n)) for n in range(4000)]
    splits = [p.split(patient) for patient in patients]
    assert [p.split(patient) for patient in reversed(patients)] == splits[::-1]
    assert abs(splits.count("train") / 4000 - 0.8) < 0.03
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02


def test_a_smaller_train_fraction_moves_nobody_into_train():
    p = Pseudonymizer(KEY)
    for n in range(500):
        if p.split(str(n), (0.6, 0.2, 0.2)) == "train":
            assert p.split(str(n), (0.8, 0.1, 0.1)) == "train"
        assert p.split(str(n), (0.9, 0.1, 0.0)) != "test"
        assert p.split(str(n), (1.0, 0.0, 0.0)) == "train"


@pytest.mark.parametrize("fractions", [(0.5, 0.1, 0.1), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_partition_are_refused(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        Pseudonymizer(KEY).split("x", fractions)


def test_a_created_key_loads_and_is_private_and_never_overwritten(tmp_path):
    path = tmp_path / "key"
    create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    key = load_key(str(path))
    assert len(key) == 32
    with pytest.raises(UserError, match="exists already"):
        create_key(path)
    assert load_key(str(path)) == key


def test_a_key_file_that_others_can_read_is_refused_with_the_command_that_helps(tmp_path):
    path = tmp_path / "key"
    create_key(path)
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"chmod 600"):
        load_key(str(path))


@pytest.mark.parametrize(
    ("text", "words"), [("xyz", "hexadecimal"), ("00ff", "fewer than 16"), ("", "fewer")]
)
def test_a_malformed_key_is_refused_without_showing_it(tmp_path, text, words):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UserError, match=words) as error:
        load_key(str(path))
    assert "openssl rand" in str(error.value) and (not text or text not in str(error.value))


def test_a_missing_key_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load_key(str(tmp_path / "none"))
    monkeypatch.delenv("MEDSWAV_KEY", raising=False)
    with pytest.raises(UserError, match="MEDSWAV_KEY"):
        load_key(None)
    monkeypatch.setenv("MEDSWAV_KEY", KEY.hex())
    assert load_key(None) == KEY
