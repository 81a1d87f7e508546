"""Settings are checked before any work, and only what shapes the output is in the fingerprint."""

import pytest

from ingest.config import load_config, partition_of
from shards.errors import UserError

BASE = {"sources": ["a"], "output": "b"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"xr_maxside": 5},
        {"codec": "jpeg"},
        {"sources": []},
        {"split_fractions": (0.5, 0.5, 0.5)},
        {"modalities": {"CT": "../ct"}},
        {"nifti_modality": "none"},
        {"tables": [{"path": "x", "colour": "red"}]},
    ],
)
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        load_config(BASE | wrong)


def test_a_yaml_file_is_read_and_a_bad_one_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sources: [a]\noutput: b\nxr_max_side: 800\n")
    assert load_config(path).xr_max_side == 800
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError):
        load_config(path)
    with pytest.raises(UserError):
        load_config(tmp_path / "gone.yaml")


def test_the_fingerprint_covers_what_shapes_the_output_and_nothing_else():
    first = load_config(BASE).fingerprint()
    same = {"sources": ["x"], "output": "y", "key_file": "k", "unit_files": 3, "sandbox": "inline"}
    assert load_config(BASE | same).fingerprint() == first
    for changed in (
        {"xr_max_side": 900},
        {"codec": "png16"},
        {"date_shift_days": 9},
        {"allow_burned_in": True},
    ):
        assert load_config(BASE | changed).fingerprint() != first


def test_the_name_of_the_site_is_not_published():
    assert "Ethelburga" not in str(load_config(BASE | {"site": "St Ethelburga"}).shaping())


def test_modality_names_of_tables_are_understood():
    modalities = load_config(BASE).modalities
    names = {"X-ray": "xr", "CR": "xr", "dx": "xr", "CT": "ct", "mri": "mr", "Ultrasound": "us", "xr": "xr"}
    assert {name: partition_of(name, modalities) for name in names} == names
    assert partition_of("PT", modalities) is None and partition_of("", modalities) is None
