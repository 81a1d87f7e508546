"""`medswav capacity` on a screen."""

from collections.abc import Iterator, Mapping
from typing import Any

_NAME = 13


def render(found: Mapping[str, Any]) -> str:
    """Of orchestration.capacity_job.capacity."""
    return "\n".join(line.rstrip() for line in _lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    images, cluster = found["images"], found["cluster"]
    total = sum(images.values())
    parts = ", ".join(f"{m} {100 * n / total:.3g} %" for m, n in images.items())
    yield f"{total:,} images ({parts}); {cluster['gpus']} GPUs in {_many(cluster['nodes'], 'node')}"
    yield f"preset {found['preset']}, {found['samples']:,} samples in batches of {found['batch']:,}"
    yield ""
    yield from _stage("ingest", "images", found["ingest"], _ingest(found["ingest"]["needs"]))
    yield ""
    yield from _stage("pretraining", "samples", found["pretraining"], _pretraining(found))
    yield ""
    yield "reckoned with"
    for names, one in _grouped(found["figures"]):
        text = f"{_value(one)}  [{one['origin']}: {one['source']}]"
        yield f"  {names:{_NAME}}{text}" if len(names) < _NAME else f"  {names} {text}"


def _stage(
    name: str, units: str, stage: Mapping[str, Any], needs: Iterator[tuple[str, str]]
) -> Iterator[str]:
    yield f"{name}: {duration(stage['seconds'])} at {_number(stage['per_second'])} {units}/s"
    limits = sorted(stage["limits"].items(), key=lambda item: item[1])
    texts = [f"{resource} {_number(rate)}" for resource, rate in limits]
    yield f"  {'bottleneck':{_NAME}}{stage['bottleneck'].upper()}; {units}/s by limit: {', '.join(texts)}"
    yield from (f"  {what:{_NAME}}{text}" for what, text in needs)


def _ingest(needs: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    yield (
        "core-hours",
        f"{needs['scan_core_hours']:,.3g} header scan, {needs['convert_core_hours']:,.3g} conversion",
    )
    yield "storage", f"{size(needs['source_bytes'])} of sources, {size(needs['stored_bytes'])} of dataset"
    yield (
        "bandwidth",
        f"{size(needs['storage_bytes_per_second'])}/s of storage, "
        f"{size(needs['network_bytes_per_second_of_a_node'])}/s a node, to keep all cores busy",
    )


def _pretraining(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    needs = found["pretraining"]["needs"]
    yield (
        "cores",
        f"{needs['cores_per_gpu']:,.1f} a GPU needed (one of them for its rank), "
        f"{found['cluster']['cores'] / found['cluster']['gpus']:,.1f} there",
    )
    yield (
        "memory",
        f"{size(needs['process_bytes'])} a process that makes batches; a node needs "
        f"{needs['processes_of_a_node']:,.1f} of them, and {needs['processes_that_fit']:,} fit",
    )
    yield (
        "catalogue",
        f"{size(needs['catalogue_bytes_of_a_node'])} a node, shared, and "
        f"{size(needs['catalogue_bytes_of_a_process'])} in each of those processes",
    )
    yield (
        "bandwidth",
        f"{size(needs['storage_bytes_per_second'])}/s of storage, "
        f"{size(needs['network_bytes_per_second_of_a_node'])}/s a node (reads, gradients), "
        f"{size(needs['crop_bytes_per_second_of_a_gpu'])}/s of crops a GPU",
    )
    for held in found["caches"][:2]:
        yield (
            "cache",
            f"{size(held['bytes'])} on a node hold {' and '.join(held['modalities'])}: "
            f"{100 * held['reads_left']:.0f} % of the reads are left",
        )
    yield "checkpoints", f"{size(needs['checkpoint_bytes'])} kept"
    passes = ", ".join(f"{m} {_number(n)}" for m, n in found["passes"].items())
    yield "passes", passes
    if found["days"] is not None:
        yield "for", f"{found['days']:g} days each GPU has to do {_number(found['needed_per_gpu'])} samples/s"


def _grouped(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Equal figures of several modalities are one line."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, one in figures.items():
        if found and found[-1][1] == one and name.split()[0] == found[-1][0].split()[0]:
            found[-1] = (f"{found[-1][0]} {name.split()[-1]}", one)
        else:
            found.append((name, one))
    return found


def duration(seconds: float) -> str:
    """90 -> `90 s`, 7200 -> `2.0 hours`."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "minutes"), (172800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / divisor:.{0 if divisor == 1 else 1}f} {unit}"
    return f"{seconds / 86400:,.1f} days"


def size(count: float) -> str:
    """1.6e13 -> `16.0 TB`."""
    for power, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count:.0f} B"


def _value(one: Mapping[str, Any]) -> str:
    first, _, rest = one["unit"].partition(" ")
    if not first.startswith("bytes"):
        return f"{_number(one['value'])} {one['unit']}"
    return f"{size(one['value'])}{first.removeprefix('bytes')} {rest}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
