"""The files of deploy/ with the values of a site, and the schemas that they are held to.

Kinds of Kubernetes itself: the schemas that the package kubernetes-validate carries, strict. Kinds of
KubeRay, Prometheus' operator and Kueue: of their own fields those that we use, below; the pods in them
strictly, as Kubernetes' own. MEDSWAV_CRDS may name a folder with their published CustomResourceDefinitions.
"""

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.34"
RAY_KINDS = ("RayCluster", "RayJob")


def values() -> dict[str, str]:
    lines = (DEPLOY / "values.env").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return dict(pairs)


def rendered(name: str) -> list[dict[str, Any]]:
    """The documents of a manifest, as render.sh gives them. A value that is not there is a KeyError."""
    text = string.Template((DEPLOY / "kubernetes" / name).read_text()).substitute(values())
    return [document for document in yaml.safe_load_all(text) if document]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]


def pod_templates(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, template) of every pod that a RayCluster or RayJob makes."""
    cluster = cluster_spec(document)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]


def check(document: dict[str, Any]) -> None:
    """Raises ValidationError of jsonschema or kubernetes_validate."""
    own = OWN.get(document["kind"])
    if own is None:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, resource(*own))
    if document["kind"] in RAY_KINDS:
        for _, template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def check_published(document: dict[str, Any], definition: dict[str, Any]) -> None:
    """Against a CustomResourceDefinition, with no field that it does not name."""
    version = document["apiVersion"].split("/")[1]
    (schema,) = [v["schema"] for v in definition["spec"]["versions"] if v["name"] == version]
    jsonschema.validate(document, closed(schema["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """OpenAPI as JSON schema: objects take the named fields only, an int-or-string is either."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and "additionalProperties" not in schema:
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        if schema["properties"].keys() >= {"kind", "apiVersion", "metadata"}:
            found["properties"]["metadata"] = {"type": "object"}
    return found


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def required(schema: dict[str, Any], *names: str) -> dict[str, Any]:
    return schema | {"required": list(names)}


def resource(group: str, spec: dict[str, Any]) -> dict[str, Any]:
    whole = fields(apiVersion={"const": group}, kind=TEXT, metadata={"type": "object"}, spec=spec)
    return required(whole, "apiVersion", "kind", "metadata", "spec")


TEXT, YES, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
ANY = {"type": "object"}
SELECTOR = fields(matchLabels=TEXTS)
HEAD = required(
    fields(
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress=YES,
        rayStartParams=TEXTS,
        template=ANY,
    ),
    "rayStartParams",
    "template",
)
WORKERS = required(
    fields(
        groupName=TEXT,
        replicas=COUNT,
        minReplicas=COUNT,
        maxReplicas=COUNT,
        rayStartParams=TEXTS,
        template=ANY,
    ),
    "groupName",
    "maxReplicas",
    "minReplicas",
    "template",
)
CLUSTER = required(
    fields(
        rayVersion=TEXT,
        authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT),
        headGroupSpec=HEAD,
        workerGroupSpecs={"type": "array", "items": WORKERS},
    ),
    "headGroupSpec",
)
JOB = fields(
    entrypoint=TEXT,
    backoffLimit=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes=YES,
    ttlSecondsAfterFinished=COUNT,
    submitterConfig=fields(backoffLimit=COUNT),
    runtimeEnvYAML=TEXT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=ANY,
)
MONITOR = required(
    fields(
        selector=SELECTOR,
        podMetricsEndpoints={
            "type": "array",
            "items": fields(
                port=TEXT,
                relabelings={"type": "array", "items": fields(targetLabel=TEXT, replacement=TEXT)},
            ),
        },
    ),
    "selector",
)
RULE = fields(**dict.fromkeys(("record", "alert", "expr", "for"), TEXT), labels=TEXTS, annotations=TEXTS)
RULES = fields(groups={"type": "array", "items": fields(name=TEXT, rules={"type": "array", "items": RULE})})
# {kind: (apiVersion, spec)}, after the definitions of KubeRay 1.7, prometheus-operator and Kueue.
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "RayCluster": ("ray.io/v1", CLUSTER),
    "RayJob": ("ray.io/v1", JOB),
    "PodMonitor": ("monitoring.coreos.com/v1", MONITOR),
    "PrometheusRule": ("monitoring.coreos.com/v1", RULES),
    "LocalQueue": ("kueue.x-k8s.io/v1beta1", fields(clusterQueue=TEXT)),
}
