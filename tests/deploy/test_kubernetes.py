"""The manifests: valid, and as safe as docs/deploy.md says."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml

from orchestration.alert_rules import Thresholds
from orchestration.cli import app
from orchestration.monitoring import files
from tests.deploy.manifests import (
    DEPLOY,
    RAY_KINDS,
    check,
    check_published,
    cluster_spec,
    pod_templates,
    rendered,
    values,
)

FILES = sorted(path.name for path in (DEPLOY / "kubernetes").glob("*.yaml"))
RAY_FILES = ("cluster.yaml", "ingest.yaml", "pretrain.yaml")
KUEUE = "kueue.x-k8s.io/queue-name"


@pytest.mark.parametrize("name", FILES)
def test_every_manifest_is_valid(name):
    documents = rendered(name)
    assert documents
    for document in documents:
        check(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == values()["NAMESPACE"]


def test_the_rules_are_valid_for_prometheus_operator():
    (document,) = yaml.safe_load_all(files(Thresholds())["kubernetes/rules.yaml"])
    check(document)


def test_a_field_that_is_misspelt_is_refused():
    (cluster,) = rendered("cluster.yaml")
    cluster_spec(cluster)["headGroupSpec"]["template"]["spec"]["securityContexts"] = {}
    with pytest.raises(Exception, match="securityContexts"):
        check(cluster)
    (job,) = rendered("pretrain.yaml")
    job["spec"]["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        check(job)


@pytest.mark.skipif(
    not os.environ.get("MEDSWAV_CRDS"),
    reason="MEDSWAV_CRDS names no folder with the CustomResourceDefinitions of KubeRay, Kueue ...",
)
def test_the_published_definitions_take_the_manifests():
    """kubectl get crd -o yaml, or the crds folders of the operators' charts."""
    texts = [path.read_text() for path in Path(os.environ["MEDSWAV_CRDS"]).glob("*.yaml")]
    found = {d["spec"]["names"]["kind"]: d for text in texts for d in yaml.safe_load_all(text) if d}
    checked = 0
    for name in FILES:
        for document in rendered(name):
            if document["kind"] in found:
                check_published(document, found[document["kind"]])
                checked += 1
    assert checked


@pytest.mark.parametrize("name", RAY_FILES)
def test_pods_have_no_rights(name):
    """Non-root, read-only root, no capabilities, no service token, /dev/shm in memory, limits."""
    (document,) = rendered(name)
    for where, template in pod_templates(document):
        spec = template["spec"]
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "medswav", where
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == int(values()["USER_ID"]) > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert not any("hostPath" in volume for volume in volumes.values())
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert volumes[mounts["/tmp"]]["emptyDir"] == {}
            if where != "submitter":
                memory = volumes[mounts["/dev/shm"]]["emptyDir"]
                assert memory["medium"] == "Memory" and memory["sizeLimit"]
            assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_token_is_on_and_nothing_is_public(name):
    (document,) = rendered(name)
    cluster = cluster_spec(document)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    assert cluster["rayVersion"] == values()["RAY_VERSION"]
    assert document["metadata"]["labels"][KUEUE] == values()["QUEUE"]


def test_jobs_are_tried_again_and_leave_no_cluster():
    for name in ("ingest.yaml", "pretrain.yaml"):
        (document,) = rendered(name)
        assert document["spec"]["backoffLimit"] >= 1 and document["spec"]["shutdownAfterJobFinishes"] is True


def test_only_pods_of_ours_prometheus_and_the_operator_reach_the_pods():
    documents = [document for name in FILES for document in rendered(name)]
    kinds = {document["kind"] for document in documents}
    assert not kinds & {"Service", "Ingress"}
    (policy,) = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "medswav"}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["ingress"]) and all(r.get("to") for r in policy["egress"])
    (namespace,) = [document for document in documents if document["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_the_jobs_run_are_commands_of_ours_with_a_port_that_is_open():
    group = typer.main.get_command(app)
    for name in ("ingest.yaml", "pretrain.yaml"):
        (document,) = rendered(name)
        program, *words = shlex.split(document["spec"]["entrypoint"])
        words = words if program == "medswav" else [program, *words]
        command = group
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        context = command.make_context(command.name, list(words))  # raises for an option that is not there
        assert context.params["metrics_host"] == "0.0.0.0"
        (head,) = cluster_spec(document)["headGroupSpec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in head["ports"]}
        assert ports["medswav"] == context.params["metrics_port"] == int(values()["METRICS_PORT"])
    (monitor,) = rendered("monitoring.yaml")
    assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= ports.keys()


def test_every_value_is_used_and_every_kind_is_known():
    texts = [p.read_text() for p in DEPLOY.rglob("*") if p.is_file() and p.suffix != ".lock"]
    text = "\n".join(texts)
    assert [name for name in values() if f"${name}" not in text and f"${{{name}}}" not in text] == []
    assert {d["kind"] for name in RAY_FILES for d in rendered(name)} == set(RAY_KINDS)


@pytest.mark.skipif(
    shutil.which("envsubst") is None, reason="envsubst is not here: apt-get install gettext-base"
)
def test_render_sh_gives_what_the_tests_have_seen():
    command = [str(DEPLOY / "kubernetes" / "render.sh"), *FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert documents == [document for name in FILES for document in rendered(name)]
