"""What `medswav doctor` says of a machine."""

import json
from pathlib import Path

from ingest.dicom import syntaxes
from orchestration import doctor
from orchestration.cli import main


def test_a_sound_machine_passes_every_check(tmp_path: Path, capsys):
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"file system: link", "file system: rename", "file system: fsync", "ports", "torch"} <= set(checks)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_fails_with_the_fix(tmp_path: Path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "does not exist: create it" in capsys.readouterr().out


def test_a_missing_decoder_names_the_package_to_install():
    check = doctor._module("no_such_module_of_ours", "some-package", "some sources")
    assert check.level == "failed" and "pip install some-package" in check.detail


def test_a_file_system_whose_links_overwrite_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda self, target: self.write_bytes(b""))
    checks = {check.name: check for check in doctor.check_folder(tmp_path)}
    assert checks["file system: link"].level == "failed"


def test_the_decoders_are_those_that_ingest_asks_for(tmp_path: Path, monkeypatch):
    packages = {status.package for status in syntaxes.decoder_status()}
    checks = {check.name: check for check in doctor.run_checks(tmp_path)}
    assert packages <= set(checks) and checks["transfer syntaxes"].level == "ok"
    missing = (("no_such_module_of_ours", "some-package", "some sources"), *syntaxes.DECODERS)
    monkeypatch.setattr(syntaxes, "DECODERS", missing)
    found = doctor._syntaxes()
    assert found.level == "failed" and "pip install some-package" in found.detail
