"""Dockerfile, docker compose, Slurm and `ray start`: what they say, and what they run."""

import json
import os
import re
import stat
import string
import subprocess
from pathlib import Path

import compose_spec
import pytest
import yaml

from tests.deploy.manifests import DEPLOY, values

ROOT = DEPLOY.parent


def compose() -> str:
    return string.Template((DEPLOY / "compose.yaml").read_text()).substitute(values())


def test_the_compose_file_is_valid_and_open_to_this_machine_only():
    as_json = json.dumps(yaml.safe_load(compose()))  # anchors resolved, as docker compose does
    compose_spec.PyCompose.from_json(as_json).to_spec()
    services = yaml.safe_load(compose())["services"]
    assert set(services) == {"ray", "prometheus", "grafana"}
    for service in services.values():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not {"privileged", "network_mode", "pid"} & service.keys()
    assert services["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert services["ray"]["secrets"] == ["ray_token"] and services["ray"]["shm_size"]
    assert services["ray"]["user"] == f"{values()['USER_ID']}:{values()['USER_ID']}"


def test_compose_mounts_what_prometheus_and_grafana_read():
    services = yaml.safe_load(compose())["services"]
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).is_dir(), volume
    mounted = {v.split(":")[1] for v in services["prometheus"]["volumes"]}
    text = (DEPLOY / "monitoring/prometheus/prometheus.yml").read_text()
    wanted = re.findall(r"(/[a-z]+)/[a-z_*-]+\.(?:json)", text)
    assert len(wanted) == 2 and set(wanted) <= mounted
    provider = yaml.safe_load(
        (DEPLOY / "monitoring/grafana/provisioning/dashboards/medswav.yaml").read_text()
    )
    path = provider["providers"][0]["options"]["path"]
    assert path in {v.split(":")[1] for v in services["grafana"]["volumes"]}


def test_the_image_is_small_and_its_user_has_no_rights():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("FROM"))
    final = lines[last:]
    (user,) = [line.split()[1] for line in final if line.startswith("USER")]
    assert user == f"{values()['USER_ID']}:{values()['USER_ID']}"
    assert sum(line.startswith("FROM") for line in lines) == 2  # nothing of the first stage but the packages
    assert [line for line in final if line.startswith(("COPY", "ADD"))] == [
        "COPY --from=build /opt/medswav /opt/medswav"
    ]
    copied = {w for line in lines[:last] if line.startswith("COPY") for w in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == copied
    assert not re.search(r"(TOKEN|PASSWORD|SECRET)=", "\n".join(lines))


@pytest.mark.parametrize(
    "name", ["ray/head.sh", "ray/worker.sh", "slurm/pretrain.sbatch", "kubernetes/render.sh"]
)
def test_scripts_are_bash_and_stop_at_the_first_error(name):
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True, timeout=20)
    assert "set -euo pipefail" in (DEPLOY / name).read_text()


def run_script(path: Path, tmp_path: Path, *arguments: str, **env: str) -> list[str]:
    """Run a script with programs that only note how they were called: their lines."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    note = tmp_path / "note"
    programs = {
        "ray": 'echo "ray $* token=$(stat -c %a "$RAY_AUTH_TOKEN_PATH") mode=$RAY_AUTH_MODE"',
        "srun": 'echo "srun $* token=$(stat -c %a "$RAY_AUTH_TOKEN_PATH") mode=$RAY_AUTH_MODE"',
    }
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line} >> {note}\n")
    for name, answer in {"scontrol": "node1\nnode2", "getent": "10.0.0.1 STREAM node1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nprintf '%s\\n' '{answer}'\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    site = (DEPLOY / "values.env").read_text().replace("=/data", f"={tmp_path}/data")
    (tmp_path / "values.env").write_text(site)
    given = {
        "MEDSWAV_VALUES": str(tmp_path / "values.env"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    subprocess.run(
        ["bash", str(path), *arguments], check=True, timeout=30, env={**os.environ, **given, **env}
    )
    return note.read_text().splitlines()


def test_the_head_makes_a_token_once_that_only_its_user_reads(tmp_path):
    first = run_script(DEPLOY / "ray/head.sh", tmp_path)
    token = tmp_path / "data/private/ray.token"
    text = token.read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", text) and stat.S_IMODE(token.stat().st_mode) == 0o600
    again = run_script(DEPLOY / "ray/worker.sh", tmp_path, "node1", "--num-gpus=4")
    assert token.read_text() == text
    assert first[0].startswith("ray start --head --block --port=6379") and "mode=token" in first[0]
    assert again[1].startswith("ray start --address=node1:6379 --block") and "--num-gpus=4" in again[1]


def test_the_slurm_job_starts_one_ray_and_removes_its_token(tmp_path):
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    script = DEPLOY / "slurm/pretrain.sbatch"
    (line,) = run_script(script, tmp_path, SLURM_SUBMIT_DIR=str(script.parent), **env)
    start, _, command = line.partition(" -- ")
    assert start == "srun ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --disable-usage-stats"
    assert (
        command.startswith("medswav pretrain --preset paper_2d_mixed")
        and "--address 10.0.0.1:6379" in command
    )
    assert "token=600 mode=token" in line
    assert list((tmp_path / "data/private").iterdir()) == []
