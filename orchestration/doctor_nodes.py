"""`medswav doctor --address`: the nodes of a cluster beside each other: what one writes, the others see."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.doctor_folders import CLOCK_SECONDS, Check
from shards.errors import UserError

TIMEOUT_SECONDS = 120.0
PACKAGES = ("medswav", "ray", "torch", "numpy", "pyarrow", "opencv-python-headless")
_SHARED = "mount the same folder on every node, at the same path"
_LATE = (
    "mount it without caches that outlive a close (NFS: lookupcache=positive, no nocto; FUSE: no cache of "
    "attributes)"
)


@dataclass(frozen=True)
class Node:
    """What a node saw. text: of the driver's file, None where it is not there; ahead_seconds: its clock
    before the file server's."""

    name: str
    versions: dict[str, str]
    text: str | None = None
    ahead_seconds: float = 0.0


def probe(name: str, folder: str, number: int) -> dict[str, Any]:
    """On a node: read what the driver wrote last, and write a file of our own for it to read."""
    from orchestration.doctor import version_of

    place = Path(folder)
    try:
        text: str | None = (place / "driver").read_text()
        own = place / f"{name}-{number}"
        own.write_text(str(number))
        ahead = time.time() - own.stat().st_mtime
    except OSError:
        text, ahead = None, 0.0
    versions = {package: version_of(package) for package in PACKAGES}
    return {"name": name, "versions": versions, "text": text, "ahead_seconds": ahead}


def check_nodes(address: str, folders: Sequence[Path]) -> list[Check]:
    """Raises UserError where the cluster cannot be reached."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestration.cluster import connected

    with connected(address):
        alive = [node for node in ray.nodes() if node["Alive"]]
        task: Any = ray.remote(probe).options(num_cpus=0)

        def ask(folder: Path, number: int) -> list[Node]:
            refs = [
                task.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote(f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}", str(folder), number)
                for node in alive
            ]
            try:
                return [Node(**found) for found in ray.get(refs, timeout=TIMEOUT_SECONDS)]
            except ray.exceptions.RayError as error:
                name = type(error).__name__
                raise UserError(
                    f"a node did not answer ({name}): is medswav installed on all nodes?"
                ) from None

        there = {node.name: node.versions for node in ask(Path("/nowhere"), 0)}
        return [versions(there), *[check for folder in folders for check in _folder(folder, ask)]]


def _folder(folder: Path, ask: Any) -> list[Check]:
    """Two rounds: each node has the folder, then sees what replaced a file that it had read."""
    import shutil
    import tempfile

    place = Path(tempfile.mkdtemp(prefix=".medswav-doctor-", dir=folder))
    place.chmod(0o777)  # nodes may have another user
    try:
        (place / "driver").write_text("before")
        first = ask(place, 1)
        (place / "new").write_text("after")
        (place / "new").replace(place / "driver")
        second = ask(place, 2)
        unseen = [
            node.name for node in second if node.text is not None and not (place / f"{node.name}-2").is_file()
        ]
        return [seen(folder, first, second, unseen), clocks(folder, second)]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def versions(by_node: Mapping[str, Mapping[str, str]]) -> Check:
    """All nodes have the same packages."""
    differing = [p for p in PACKAGES if len({found.get(p) for found in by_node.values()}) > 1]
    if not differing:
        return Check("nodes: versions", "ok", f"{len(by_node)} nodes have the same {', '.join(PACKAGES)}")
    package = differing[0]
    text = ", ".join(f"{name} {found.get(package)}" for name, found in by_node.items())
    fix = "install deploy/requirements.lock on every node"
    return Check("nodes: versions", "failed", f"{package}: {text}", fix)


def seen(folder: Path, first: Sequence[Node], second: Sequence[Node], unseen: Sequence[str]) -> Check:
    """first, second: before and after the driver replaced its file; unseen: nodes whose files the driver does
    not see."""
    name = "nodes: close-to-open"
    if away := [node.name for node in first if node.text is None]:
        return Check(name, "failed", f"{folder} is not on {', '.join(away)}", _SHARED)
    late = [node.name for node in second if node.text != "after"] or list(unseen)
    if late:
        return Check(name, "failed", f"{', '.join(late)} sees, or shows, old files in {folder}", _LATE)
    return Check(name, "ok", f"{len(first)} nodes see in {folder} what another has closed")


def clocks(folder: Path, nodes: Sequence[Node]) -> Check:
    """Of the nodes against the file server."""
    off = {node.name: node.ahead_seconds for node in nodes if abs(node.ahead_seconds) > CLOCK_SECONDS}
    if not off:
        return Check("nodes: clock", "ok", f"{len(nodes)} nodes agree with the file server of {folder}")
    text = ", ".join(f"{name} by {seconds:+.1f} s" for name, seconds in off.items())
    return Check("nodes: clock", "warning", text, "let chrony or ntpd set the clocks of the nodes")
