"""What `medswav doctor` says of a machine."""

import json
import os
from pathlib import Path

from ingest.dicom import syntaxes
from orchestration import doctor, doctor_folders
from orchestration.cli import main


def test_a_sound_machine_passes_every_check(tmp_path: Path, capsys):
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {"file system: link", "file system: rename", "file system: fsync", "ports", "torch"} <= set(checks)
    assert {"file system: close-to-open", "clock", "inodes", "token", "GPU and NCCL"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["level"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_fails_with_the_fix(tmp_path: Path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    told = capsys.readouterr().out
    assert "does not exist" in told and "fix: create it" in told and told.endswith("1 failed\n")


def test_a_missing_decoder_names_the_package_to_install():
    check = doctor._module("no_such_module_of_ours", "some-package", "some sources")
    assert check.level == "failed" and check.fix == "pip install some-package"


def test_a_file_system_whose_links_overwrite_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda self, target: self.write_bytes(b""))
    checks = {check.name: check for check in doctor_folders.check_folder(tmp_path)}
    assert checks["file system: link"].level == "failed"


def test_the_decoders_are_those_that_ingest_asks_for(tmp_path: Path, monkeypatch):
    packages = {status.package for status in syntaxes.decoder_status()}
    checks = {check.name: check for check in doctor.run_checks([tmp_path])}
    assert packages <= set(checks) and checks["transfer syntaxes"].level == "ok"
    missing = (("no_such_module_of_ours", "some-package", "some sources"), *syntaxes.DECODERS)
    monkeypatch.setattr(syntaxes, "DECODERS", missing)
    found = doctor._syntaxes()
    assert found.level == "failed" and "pip install some-package" in found.detail


def test_a_clock_that_differs_and_a_file_system_without_room_are_named_with_the_fix(tmp_path: Path):
    assert doctor_folders.clock(1.0).level == "ok" and doctor_folders.clock(-90.0).level == "warning"
    assert "90.0 s behind" in doctor_folders.clock(-90.0).detail and "chrony" in doctor_folders.clock(90).fix
    assert (
        doctor_folders.space(tmp_path, 1e7).level == "failed"
        and doctor_folders.space(tmp_path, 1e12).fix == ""
    )
    few = os.statvfs_result((4096, 4096, 1, 1, 1, 500, 20, 20, 0, 255))
    none = os.statvfs_result((4096, 4096, 1, 1, 1, 0, 0, 0, 0, 255))
    assert doctor_folders.inodes(tmp_path, few).level == "failed"
    assert doctor_folders.inodes(tmp_path, none).level == "ok"


def test_a_file_system_on_which_writes_come_late_is_refused(tmp_path: Path, monkeypatch):
    """As with attributes that a client keeps: the reader still sees the file of before."""
    monkeypatch.setattr(Path, "replace", lambda self, target: self)
    checks = {check.name: check for check in doctor_folders.check_folder(tmp_path)}
    assert "does not see" in checks["file system: close-to-open"].detail


def test_a_token_that_others_can_read_and_one_that_is_not_there_are_refused(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o640)
    found = doctor.token({"RAY_AUTH_TOKEN_PATH": str(file)})
    assert found.level == "failed" and found.fix == f"chmod 600 {file}" and "secret" not in str(found)
    file.chmod(0o600)
    assert doctor.token({"RAY_AUTH_TOKEN_PATH": str(file)}).level == "ok"
    assert doctor.token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}).level == "failed"
    assert doctor.token({"RAY_ADDRESS": "head:6379"}).level == "warning"
    assert doctor.token({}).level == "ok"


def test_a_gpu_that_torch_cannot_use_and_one_without_nccl_are_named():
    assert doctor.gpu([], None, None, device_file=False).level == "ok"
    unused = doctor.gpu([], None, None, device_file=True)
    assert unused.level == "failed" and "CPU build" in unused.detail and "nvidia-smi" in unused.fix
    assert "NCCL" in doctor.gpu(["H100"], None, "13.0", True).fix
    assert doctor.gpu(["H100"], "2.27", "13.0", True, lambda: None).level == "ok"
    assert "no kernel" in doctor.gpu(["H100"], "2.27", "13.0", True, lambda: "no kernel image").detail


def test_a_package_that_is_too_old_is_named_with_the_version_to_install():
    found = doctor.held_to("torch", "2.9.1+cu128", "2.11", "training")
    assert found.level == "failed" and found.fix == "pip install 'torch>=2.11'"
    assert doctor.held_to("torch", "2.13.0+cpu", "2.11", "training").level == "ok"
