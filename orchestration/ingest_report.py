"""What `ingest plan`, `status`, `verify` and `label` print: text for people, or JSON."""

import dataclasses
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration import keys
from orchestration.cluster import process_folder
from orchestration.progress import format_seconds
from shards.errors import UserError

if TYPE_CHECKING:
    from ingest.config import IngestConfig


LEFT_OUT_TEXT = {
    "duplicate": "equal to another image of the dataset",
    "uid_collision": "another image of the dataset has its instance UID, with other pixels",
}


def plan_report(config: "IngestConfig", as_json: bool) -> str:
    """What a run would meet and cost, from the headers and a decoded sample. Raises UserError."""
    from ingest.estimate import estimate
    from ingest.inventory import forget_parts
    from ingest.limits import own_meter
    from ingest.sources import limited
    from orchestration.inventory_job import take_inventory
    from shards.ids import Pseudonymizer

    with tempfile.TemporaryDirectory(prefix="plan-", dir=process_folder()) as folder:
        # On disk, as for a run: sources may hold any number of files. Nobody sees the pseudonyms of a plan.
        entries = take_inventory(config, Pseudonymizer(os.urandom(32)), Path(folder), None, None)
        with limited(own_meter(config.bytes_per_second, config.open_files)):
            report = estimate(entries, config)
        forget_parts()
    if as_json:
        return json.dumps(dataclasses.asdict(report), indent=1)
    lines = [f"files    {report.inputs} ({_megabytes(report.bytes_in)})"]
    lines += [f"kind     {count} {kind}" for kind, count in sorted(report.kinds.items())]
    lines += [f"{modality:8} about {count} images" for modality, count in sorted(report.images.items())]
    lines += [f"refused  about {count} {reason}" for reason, count in sorted(report.refusals.items())]
    lines.append(f"output   about {_megabytes(report.bytes_out)}")
    lines.append(
        f"time     about {format_seconds(report.core_seconds)} on one core "
        f"(from {report.sampled} decoded files); nothing was written"
    )
    return "\n".join(lines)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def status_report(dataset: Path, as_json: bool) -> str:
    """Planned and committed units, images by modality and split, refusals by reason. Raises UserError."""
    from shards import catalog, exclusions
    from shards.commit import list_commits
    from shards.dataset import read_info
    from shards.objects import open_store
    from shards.plan import planned_units
    from shards.retries import input_count

    store = open_store(dataset)
    info = read_info(store)
    commits = list_commits(store)
    planned = planned_units(store)
    done = {commit.unit for commit in commits}
    left_out = exclusions.read(store)
    facts: dict[str, Any] = {
        "codec": info.codec,
        "key_id": info.key_id,
        "units_planned": len(planned | done),
        "units_committed": len(done),
        "inputs": input_count(commits),
        "bytes": sum(file.size for commit in commits for file in commit.files()),
        "samples": catalog.counts(store),
        "volumes": catalog.counts(store, volumes=True),
        "quarantined": dict(Counter(catalog.quarantine(store)["reason"].to_pylist()).most_common()),
        "excluded": left_out.reasons(),
        "units_not_compared": len(done - left_out.units),
        "labels": catalog.label_names(store),
    }
    return json.dumps(facts, indent=1) if as_json else "\n".join(_status_lines(facts))


def _status_lines(facts: dict[str, Any]) -> list[str]:
    left = facts["units_planned"] - facts["units_committed"]
    state = "complete" if left == 0 else f"{left} to do: run the same `ingest run` again"
    lines = [
        f"units    {facts['units_committed']} of {facts['units_planned']} committed ({state})",
        f"files    {facts['inputs']}",
        f"bytes    {facts['bytes']} ({facts['codec']})",
    ]
    for modality, splits in facts["samples"].items():
        parts = ", ".join(f"{split} {count}" for split, count in splits.items())
        lines.append(f"{modality:8} {sum(splits.values())} images ({parts})")
    for partition, splits in facts["volumes"].items():
        parts = ", ".join(f"{split} {count}" for split, count in splits.items())
        lines.append(f"{partition} {sum(splits.values())} volumes ({parts})")
    for reason, count in facts["quarantined"].items():
        lines.append(f"refused  {count} {reason}")
    for reason, count in facts["excluded"].items():
        lines.append(f"left out {count} {reason} ({LEFT_OUT_TEXT[reason]})")
    if facts["units_not_compared"]:
        lines.append(
            f"compared all but {facts['units_not_compared']} units for duplicates: run ingest dedupe"
        )
    lines.append(f"labels   {', '.join(facts['labels']) or 'none'}")
    return lines


def verify_report(dataset: Path, deep: bool, as_json: bool) -> tuple[bool, str]:
    """(clean, text). Raises UserError where `dataset` is none."""
    from shards.commit import committed_units
    from shards.objects import open_store
    from shards.plan import planned_units
    from shards.verify import verify

    store = open_store(dataset)
    report = verify(store, deep=deep)
    missing = len(planned_units(store) - committed_units(store))
    if as_json:
        facts = {"clean": report.clean, "units_missing": missing}
        return report.clean, json.dumps(dataclasses.asdict(report) | facts, indent=1)
    lines = [str(problem) for problem in report.problems]
    volumes = f"{report.volumes} volumes, " if report.volumes else ""
    what = "every file hashed, every image decoded" if deep else "sizes and indexes; --deep checks contents"
    left_out = f"{report.excluded} left out, " if report.excluded else ""
    lines.append(
        f"{'clean' if report.clean else f'{len(report.problems)} problems'}: {report.units} units, "
        f"{report.samples} images, {left_out}{volumes}{report.quarantined} refusals, "
        f"{report.size} bytes ({what})"
    )
    if missing:
        lines.append(f"{missing} planned units are not committed: run the same `ingest run` again")
    if report.orphans:
        lines.append(f"{len(report.orphans)} files that no commit names (harmless: no reader sees them)")
    return report.clean, "\n".join(lines)


def snapshot_report(dataset: Path, as_json: bool) -> str:
    """Take a snapshot of the commits; what it covers. Raises UserError."""
    from shards.dataset import read_info
    from shards.objects import open_store
    from shards.snapshot import take

    store = open_store(dataset)
    read_info(store)
    taken = take(store)
    if as_json:
        return json.dumps(dataclasses.asdict(taken), indent=1)
    if not taken.name:
        return "nothing is committed yet: no snapshot was written"
    said = "wrote" if taken.created else "there was already"
    replaced = f"; {len(taken.removed)} before it removed" if taken.removed else ""
    return f"{said} {taken.name}: {taken.units} commits, {_megabytes(taken.size)}{replaced}"


def _classes(table: Any) -> list[str]:
    """Every class that a table of labels gives, once for each image or box."""
    if "label" in table.column_names:
        return table["label"].to_pylist()
    if "labels" in table.column_names:
        return [value for values in table["labels"].to_pylist() for value in values]
    if "boxes" in table.column_names:
        return [box["label"] or "box" for boxes in table["boxes"].to_pylist() for box in boxes]
    return []


def label_report(
    dataset: Path,
    csv: Path,
    key: Path | None,
    site: str | None,
    name: str,
    sources: list[Path] | None = None,
    kind: str = "classes",
    values: list[str] | None = None,
    by: str | None = None,
    of: str = "images",
) -> str:
    """Join a CSV to a dataset; what matched. Raises UserError, also when the key is not the dataset's."""
    from ingest.labels import join_labels
    from shards.dataset import read_info
    from shards.ids import Pseudonymizer
    from shards.objects import open_store

    info = read_info(open_store(dataset))
    names = Pseudonymizer(keys.read(key, dataset), site or "")
    if names.key_id != info.key_id:
        raise UserError(
            f"the key is not the one of the dataset (its id is {info.key_id}, this one's {names.key_id}): "
            "give the key of `ingest run`"
        )
    if info.config.get("site", names.site_id) != names.site_id:
        raise UserError("the site is not the one of the dataset: give the --site of `ingest run`")
    given = values or ()
    table = join_labels(
        dataset, csv, names, name, by=by, sources=sources or (), kind=kind, values=given, of=of
    )
    counts = Counter(_classes(table))
    lines = [f"{table.num_rows} {of} labelled in labels/{name}.parquet"]
    lines += [f"  {value}: {count}" for value, count in counts.most_common(20)]
    unmatched = int((table.schema.metadata or {}).get(b"unmatched", b"0"))
    if unmatched:
        lines.append(f"{unmatched} rows of the table have no label or match none")
    misplaced = int((table.schema.metadata or {}).get(b"misplaced", b"0"))
    if misplaced:
        lines.append(f"{misplaced} boxes or masks do not fit their image and were left out")
    return "\n".join(lines)
