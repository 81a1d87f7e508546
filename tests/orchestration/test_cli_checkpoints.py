"""`medswav checkpoints ls` and `verify`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestration import cli
from trainer import attempts, checkpoint


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Steps 20 (every 20), 30 and 40, by attempt 1."""
    attempt = attempts.begin(tmp_path)
    attempt.begin_from(0)
    settings = {"every_steps": 10, "keep": 2, "keep_every_steps": 20}
    for step in (10, 20, 30, 40):
        about = {"config": {"checkpoint": settings}}
        tensors = {"model.w": torch.full((100,), float(step))}
        checkpoint.save(tmp_path, step, tensors, about, keep=2, keep_every=20, attempt=attempt)
    return tmp_path


def ask(capsys, *arguments: object) -> tuple[int, str]:
    code = cli.main(["checkpoints", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_ls_says_of_each_checkpoint_why_it_is_kept(run_dir, capsys):
    code, text = ask(capsys, "ls", run_dir)
    header, *rows, last = text.splitlines()
    assert code == 0 and header.split() == ["step", "bytes", "age", "attempt", "state", "kept"]
    assert [row.split()[0] for row in rows] == ["20", "30", "40"]
    assert [row.partition("sizes")[2].strip() for row in rows] == [
        "every 20 steps",
        "one of the newest 2",
        "the newest",
    ]
    assert last == "3 of 3 have the sizes of their manifests"
    found = json.loads(ask(capsys, "ls", run_dir, "--json")[1])
    size = sum(
        (checkpoint.path_of(run_dir, 40) / n).stat().st_size for n in ("state.safetensors", "state.json")
    )
    assert found[2]["bytes"] == size and found[2]["attempt"] == 1 and found[2]["trouble"] is None
    assert 0 <= found[2]["age_seconds"] < 3600


def test_verify_hashes_all_files_and_fails_when_one_has_changed(run_dir, capsys):
    code, text = ask(capsys, "verify", run_dir)
    assert code == 0 and text.splitlines()[-1] == "3 of 3 verify"
    path = checkpoint.path_of(run_dir, 30) / checkpoint.TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "3 of 3" in ask(capsys, "ls", run_dir)[1]  # the size is the same
    code, text = ask(capsys, "verify", run_dir)
    assert code == 1 and "BAD: state.safetensors is not what the manifest says" in text
    assert text.splitlines()[-1] == "2 of 3 verify"
    (checkpoint.path_of(run_dir, 40) / checkpoint.MANIFEST).unlink()
    code, text = ask(capsys, "verify", run_dir, "--json")
    rows = json.loads(text)
    assert code == 1 and [row["trouble"] is None for row in rows] == [True, False, False]
    assert rows[2]["trouble"] == "a file is missing" and rows[2]["bytes"] is None


def test_a_checkpoint_of_a_replaced_attempt_is_shown_as_such(run_dir, capsys):
    attempts.begin(run_dir).begin_from(30)
    code, text = ask(capsys, "verify", run_dir)
    assert code == 1 and "BAD: of an attempt that attempt 2 had replaced" in text
    assert "30" in text and "the newest" in text.splitlines()[2]


def test_a_folder_without_checkpoints_is_one_line_and_code_2(tmp_path, capsys):
    assert cli.main(["checkpoints", "ls", str(tmp_path)]) == 2
    assert "has no checkpoints: give the --run-dir" in capsys.readouterr().err


def test_listing_imports_no_torch(run_dir):
    code = (
        "import sys; from orchestration import cli; "
        "code = cli.main(['checkpoints', 'verify', sys.argv[1]]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
