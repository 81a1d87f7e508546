"""What one `ingest run` did and what the dataset holds after it: figures, exit code, the last lines."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestration.progress import format_seconds

if TYPE_CHECKING:
    from ingest.config import IngestConfig


@dataclass
class IngestSummary:
    """What one `ingest run` did, and what the dataset holds after it."""

    units: int = 0  # planned, whatever was done before
    already: int = 0  # committed before this run
    committed: int = 0  # by this run
    waiting: int = 0  # units that need files of a source that was not given
    absent: int = 0  # planned files that are not here as they were planned: gone, changed, another source
    failed: dict[str, int] = field(default_factory=dict)  # kind of error -> units without a commit
    samples: dict[str, dict[str, int]] = field(default_factory=dict)  # modality -> split -> count, dataset
    quarantined: dict[str, int] = field(default_factory=dict)  # reason -> rows, dataset
    excluded: dict[str, int] = field(default_factory=dict)  # reason -> images left out, dataset
    inputs: int = 0  # of the dataset
    bytes_in: int = 0
    bytes_out: int = 0
    leased_bytes: int = 0  # of the sources, by the workers, under bytes_per_second
    leased_seconds: float = 0.0  # in which they were granted
    seconds: float = 0.0
    interrupted: bool = False
    over_budget: bool = False

    @property
    def total(self) -> int:
        return sum(sum(splits.values()) for splits in self.samples.values())

    @property
    def exit_code(self) -> int:
        """0 only if every unit is committed and the failure budget is respected (data.md section 6)."""
        if self.interrupted:
            return 130
        incomplete = self.absent or self.committed + self.already < self.units
        return 3 if self.failed or self.over_budget or incomplete else 0


def summary_lines(summary: IngestSummary, config: "IngestConfig") -> list[str]:
    """The end of `ingest run`, for people."""
    lines = [
        f"ingest: {summary.committed} units committed in {format_seconds(summary.seconds)}, "
        f"{summary.already} were there before; the dataset has {summary.total} images "
        f"of {summary.inputs} files"
    ]
    if config.bytes_per_second is not None and summary.leased_bytes:
        rate = summary.leased_bytes / max(summary.leased_seconds, 1e-3)
        lines.append(
            f"  read {summary.leased_bytes / 1e6:.1f} MB of the sources, {rate / 1e6:.2f} MB/s on average "
            f"(limit {config.bytes_per_second / 1e6:.2f})"
        )
    for modality, splits in summary.samples.items():
        parts = ", ".join(f"{split} {count}" for split, count in splits.items())
        lines.append(f"  {modality:6} {sum(splits.values()):8}  ({parts})")
    if summary.quarantined:
        lines.append(f"  refused {sum(summary.quarantined.values()):7}  " + _reasons(summary.quarantined))
    if summary.excluded:
        lines.append(f"  left out {sum(summary.excluded.values()):6}  " + _reasons(summary.excluded))
    if summary.quarantined.get("burned_in_risk"):
        lines.append(
            "ingest: the burned_in_risk images may hold names in their pixels; after checking them, "
            "`--set allow_burned_in=true` in a new output folder takes them"
        )
    if summary.absent:
        lines.append(
            f"ingest: {summary.absent} planned files are not under the given sources as they were planned "
            "(gone, changed, or of another source); nothing is lost: a run with them converts them"
        )
    if summary.failed:
        lines.append(
            f"ingest: {sum(summary.failed.values())} units failed ({_reasons(summary.failed)}); "
            "nothing is lost: run the same command again"
        )
    if summary.over_budget:
        lines.append(
            f"ingest: more than {config.failure_budget:.1%} of the inputs crashed, did not decode or are "
            "damaged (the failure budget): look at `ingest status`, or raise failure_budget"
        )
    if summary.interrupted:
        lines.append("ingest: interrupted; what is committed stays, run the same command again to go on")
    return lines


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
