"""What trainer.explain found, in lines for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.config import TrainConfig
from trainer.explain import explain

_NAME = 16  # width of the names in front


def explained(config: TrainConfig, world: int, preset: str, *, as_json: bool) -> str:
    """`trainer.explain.explain` as text or JSON. Raises UserError."""
    found = explain(config, world, preset)
    return json.dumps(found, indent=1) if as_json else render(found)


def render(found: Mapping[str, Any]) -> str:
    """The values of `trainer.explain.explain`, a line or a few each."""
    lines = [f"{found['preset']}, {found['method']}, on {found['batch']['ranks']} ranks; nothing is started"]
    parts = (
        _batch,
        _horizon,
        _learning_rate,
        _passes,
        _order,
        _labels,
        _prototypes,
        _queue,
        _crops,
        _network,
        _bytes,
    )
    for part in parts:
        for name, text in part(found):
            head = f"{name:{_NAME}}" if len(name) < _NAME else f"{name} "
            lines.append(f"{head}{text}")
    lines += ["", "open points of the paper, and how they are read (docs/training.md)"]
    for point, about in found["open_points"].items():
        lines.append(f"  {point}  {about['reading']}")
        settings = [f"{name}={_value(value)}" for name, value in about["settings"].items()]
        lines += [f"     {text}" for text in _wrapped(settings)]
    lines += ["", *(f"warning: {text}" for text in found["warnings"])]
    return "\n".join(lines).rstrip()


def _batch(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    batch = found["batch"]
    yield "batch", f"{batch['global']:,} {found['samples']} of all ranks, {batch['per_rank']:,} of a rank"
    if batch["micro_batches"] > 1:
        parts = batch["micro_batches"]
        yield "", f"in {parts} micro-batches of {batch['per_rank'] // parts:,}, one Sinkhorn over all of them"
    if "per_modality" not in batch:
        yield "", f"sampling {batch['sampling']}: shares depend on a dataset, data.dataset=FOLDER"
        return
    of = [
        f"{m} {_number(n)} ({_number(batch['per_modality_and_rank'][m])} of a rank)"
        for m, n in batch["per_modality"].items()
    ]
    yield "", f"sampling {batch['sampling']}: {', '.join(of)}"


def _horizon(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    horizon = found["horizon"]
    text = f"{horizon['steps']:,} steps, {horizon['samples']:,} samples"
    if horizon["epochs"] is not None:
        text += f", {_number(horizon['epochs'])} epochs of {horizon['epoch_samples']:,} samples"
    yield "horizon", text


def _learning_rate(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rate = found["learning_rate"]
    at = [f"{point['value']:.4g} at step {point['step']:,}" for point in rate["at"].values()]
    yield "learning rate", f"{rate['optimizer']}: {', '.join(at)}"
    yield (
        "",
        f"scaling {rate['scaling']} (factor {rate['factor']:g}); warm-up of {rate['warmup_steps']:,} steps",
    )


def _passes(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    what = found["samples"]
    yield what, found["data"]["images_from"]
    for name, m in found["modalities"].items():
        there = "?" if m["images"] is None else f"{m['images']:,}"
        passes = "?" if m["passes"] is None else _number(m["passes"])
        drawn = "?" if m["drawn"] is None else f"{m['drawn']:,}"
        yield "", f"{name}: {there} {what}, {drawn} drawn, {passes} passes"


def _order(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    order = found["order"]
    if order["layout"] == "keys":
        yield "order", f"keys: single {found['samples']}, shuffled as a whole"
        return
    samples, blocks = order["block_samples"], order["group_blocks"]
    yield (
        "order",
        f"blocks of {samples:,} neighbours, {blocks:,} of them shuffled together; "
        f"{order['virtual_ranks']:,} virtual ranks",
    )
    whole = [name for name, m in order["modalities"].items() if m["whole"]]
    if whole:
        what = f"no more {found['samples']} than {samples * blocks:,}"
        yield "", f"{', '.join(whole)}: {what}, shuffled as a whole"
    for name, m in order["modalities"].items():
        if not m["whole"]:
            steps = "" if m["steps"] is None else f", a virtual rank in one group for {m['steps']:,} steps"
            size = "" if m["pool_bytes"] is None else f" ({_bytes_text(m['pool_bytes'])} encoded)"
            yield "", f"{name}: {m['pool']:,} {found['samples']} mixed at a time{size}{steps}"


def _labels(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, one in found["labels"].items():
        classes = "?" if one["classes"] is None else len(one["classes"])
        what = f"{classes} classes, kind {one['kind']}, for {', '.join(one['modalities'])}"
        yield "labels", f"{name}: {what}; alpha {one['alpha']:g}, beta {one['beta']:g}"


def _prototypes(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    p = found["prototypes"]
    if not p:
        return
    told = f"{p['of_each_group']:,} of each of {', '.join(p['groups'])}"
    yield "prototypes", f"{told}; frozen until {_when(p['frozen'])}"
    queued = f"{_number(p['samples_of_a_group'])} + {p['queue_of_a_group']:,}"
    yield (
        "codes",
        f"epsilon {p['epsilon']:g}, temperature {p['temperature']:g}; (B_m + queue) / K = ({queued}) / "
        f"{p['of_each_group']:,} = {p['ratio']:.2f}, without the queue {p['ratio_without_queue']:.2f}",
    )


def _queue(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    queue = found["queue"]
    if not queue:
        yield "queue", "none"
        return
    crops = ", ".join(map(str, queue["assigned_crops"]))
    yield (
        "queue",
        f"{queue['length']}: {queue['of_each_group_and_crop']:,} of each group and assigned crop ({crops}); "
        f"{queue['of_each_rank']:,} scored by a rank",
    )
    yield (
        "",
        f"{_bytes_text(queue['bytes_of_every_rank'])} on every rank; the last {queue['batches']:,} batches",
    )
    yield "", f"fills from {_when(queue['starts'])}"
    yield "", f"used from {_when(queue['used_from'])}"


def _crops(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, about in found["crops"].items():
        shape = "a square image" if about["image"] == "square" else "{} x {} px".format(*about["image"])
        if about["slices"] is not None:
            shape = f"the plane, {shape}, all {about['slices']} slices"
        parts = [
            f"{c['count']} x {_size(c['size'])} px {100 * c['share'][0]:.1f} to {100 * c['share'][1]:.1f} %"
            for c in about["crops"]
        ]
        side = about["longer_side"]
        scaled = f", rescaled to {side[0]:g}-{side[1]:g} px" if side else ""
        if about["planes"]:
            scaled = ", rescaled to {}-{} px".format(*map(_size, about["planes"]))
        yield f"crops of {name}", f"{', '.join(parts)} of {shape}{scaled}"


def _network(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    compute = found["compute"]
    parts = [f"{name} {count:,}" for name, count in compute["parameters"].items()]
    yield "parameters", ", ".join(parts)
    yield (
        "GFLOP",
        f"{compute['gflop_per_sample']:,.4g} a sample, {compute['gflop_per_step']:,.0f} a step, "
        f"{compute['gflop_per_step_and_rank']:,.0f} a step and rank (forward and backward)",
    )


def _bytes(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    size = {name: _bytes_text(value) for name, value in found["bytes"].items()}
    yield (
        "bytes a step",
        f"batch {size['batch']}, of a rank {size['batch_of_a_rank']}; gradients {size['gradients']}",
    )
    yield (
        "memory",
        f"{size['activations_of_a_rank']} of activations on a rank, in fp32 and without "
        "model.activation_checkpointing; weights, optimizer and their gradients come to that",
    )
    yield "checkpoint", f"{size['checkpoint']}; kept at the most {size['checkpoints_kept']}"


def _size(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _when(at: Mapping[str, Any]) -> str:
    epoch = "" if at["epoch"] is None else f", epoch {_number(at['epoch'])}"
    return (
        f"step {at['step']:,} ({at['samples']:,} samples{epoch}, {100 * at['of_the_run']:.3g} % of the run)"
    )


def _number(value: float) -> str:
    """Whole where it is large, short where it is small."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _bytes_text(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{value:.3g} {unit}"


def _value(value: Any) -> str:
    return json.dumps(value).replace('"', "").replace(" ", "")


def _wrapped(words: list[str], width: int = 105) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
