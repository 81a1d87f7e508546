"""What the report shows, as plain values: no file is read here, no markup is written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

MODALITY_NAMES = {"xr": "X-ray", "ct": "CT", "mr": "MR", "us": "Ultrasound", "all": "All modalities"}
ENCODERS = ("pretrained", "random", "pixels")
ENCODER_NAMES = {"pretrained": "Pretrained", "random": "Random-initialised", "pixels": "Pixel baseline"}
PROBE_NAMES = {"linear": "Linear probe", "knn": "kNN"}
# Settings that say where files lie: no page shows them.
PATHS = (
    ("data", "dataset"),
    ("data", "node_cache"),
    ("data", "catalogue_cache"),
    ("views", "band_statistics"),
    ("model", "init_weights"),
)


def modality_name(modality: str) -> str:
    return MODALITY_NAMES.get(modality, modality.upper())


@dataclass(frozen=True)
class ModalityCount:
    """Images (not files) and patients of one modality."""

    modality: str
    train: int
    val: int
    test: int
    patients: int

    @property
    def total(self) -> int:
        return self.train + self.val + self.test


@dataclass(frozen=True)
class Refusal:
    reason: str  # a shards.schema.Reason
    count: int


@dataclass(frozen=True)
class Samples:
    """Pictures of one modality: uint8 [H, W] each."""

    modality: str
    images: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Views:
    """One image, uint8 [H, W], and its crops: a uint8 array [count, size, size] per crop group."""

    modality: str
    image: NDArray[np.uint8]
    crops: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Curve:
    """Loss by step; `ln_k` is the loss of a network that tells no prototype from another."""

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    by_modality: dict[str, tuple[float, ...]]
    ln_k: float
    max_steps: int


@dataclass(frozen=True)
class PrototypeUse:
    """Images (whole training split) whose nearest prototype is k, for each k; `effective` is exp of the
    entropy of that distribution, `dead` counts the prototypes that are nearest to no image."""

    modality: str
    counts: tuple[int, ...]
    effective: float
    dead: int

    @classmethod
    def of(cls, modality: str, counts: Sequence[int]) -> "PrototypeUse":
        used = np.asarray(counts, dtype=np.float64)
        share = used[used > 0] / max(used.sum(), 1.0)
        effective = float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0
        return cls(modality, tuple(int(c) for c in counts), effective, int((used == 0).sum()))


@dataclass(frozen=True)
class Score:
    modality: str
    encoder: str  # pretrained | random | pixels
    probe: str  # linear | knn
    seed: int
    auc: float
    n_train: int
    n_test: int


@dataclass(frozen=True)
class StepTime:
    name: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class ReportData:
    """Everything the report says. Empty parts are reported as missing, with `probe_skipped` as the reason
    for missing scores. `generated`: no pixel is of a patient."""

    generated: bool
    date: str
    counts: tuple[ModalityCount, ...] = ()
    inputs: int = 0
    refusals: tuple[Refusal, ...] = ()
    samples: tuple[Samples, ...] = ()
    views: tuple[Views, ...] = ()
    curve: Curve | None = None
    alarms: tuple[str, ...] = ()  # of the training, one sentence each, in their order
    prototypes: tuple[PrototypeUse, ...] = ()
    scores: tuple[Score, ...] = ()
    probe_skipped: str | None = None
    label_note: str = ""
    seed_note: str = ""
    notes: tuple[str, ...] = ()
    steps: tuple[StepTime, ...] = ()
    commands: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] = field(default_factory=dict)
    config: str = ""  # YAML of the training configuration


@dataclass(frozen=True)
class Spread:
    """Mean, minimum and maximum of an AUC over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        found = [v for v in values if np.isfinite(v)]
        return cls(fmean(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class Comparison:
    """One modality and probe: what each encoder reached, and pretrained minus random-initialised."""

    modality: str
    probe: str
    spreads: dict[str, Spread]
    n_train: int
    n_test: int
    seeds: int
    every_seed: bool = False  # with each seed, the worst pretrained is above the best random-initialised one

    def margin(self, other: str = "random") -> float | None:
        ours, theirs = self.spreads.get("pretrained"), self.spreads.get(other)
        return ours.mean - theirs.mean if ours and theirs else None

    def beats(self, other: str = "random") -> bool:
        """True where the worst seed of the pretrained encoder is above the best seed of the other."""
        ours, theirs = self.spreads.get("pretrained"), self.spreads.get(other)
        return bool(ours and theirs and ours.low > theirs.high)


def compare(scores: Sequence[Score]) -> list[Comparison]:
    """Scores by modality and probe, in the order in which they come."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.modality, score.probe), []).append(score)
    rows = []
    for (modality, probe), group in groups.items():
        spreads = {e: Spread.of(s.auc for s in group if s.encoder == e) for e in ENCODERS}
        rows.append(
            Comparison(
                modality,
                probe,
                {e: s for e, s in spreads.items() if s},
                max(s.n_train for s in group),
                max(s.n_test for s in group),
                len({s.seed for s in group}),
                _every_seed(group),
            )
        )
    return rows


def _every_seed(group: Sequence[Score]) -> bool:
    """Seeds split the patients, so scores of one seed are of the same test patients."""
    by_seed: dict[int, dict[str, list[float]]] = {}
    for score in group:
        by_seed.setdefault(score.seed, {}).setdefault(score.encoder, []).append(score.auc)
    pairs = [(by.get("pretrained"), by.get("random")) for by in by_seed.values()]
    return all(ours and theirs and min(ours) > max(theirs) for ours, theirs in pairs)


def headline(data: ReportData) -> tuple[str, str]:
    """The outcome in words: one line, and the sentences below it."""
    rows = [c for c in compare(data.scores) if c.probe == "linear"]
    images = sum(c.total for c in data.counts)
    ingested = (
        f"{images:,} {_plural(images, 'image')} of "
        f"{len(data.counts)} {_plural(len(data.counts), 'modality', 'modalities')}"
    )
    if not rows:
        title = f"An encoder pretrained on {ingested}"
        why = data.probe_skipped or "No score was computed."
        return title, f"{why} {_learned(data.curve)}".strip()
    won = [c for c in rows if c.beats("random")]
    if len(won) == len(rows):
        where = f"all {len(rows)} modalities" if len(rows) > 1 else modality_name(rows[0].modality)
        title = f"Pretraining beats random initialisation in {where}"
    elif won:
        title = f"Pretraining beats random initialisation in {len(won)} of {len(rows)} modalities"
    else:
        title = "Pretraining has not beaten random initialisation"
    pixels = sum(c.beats("pixels") for c in rows)
    lead = (
        f"Linear probe on frozen features, {ingested}. It counts as beaten when the worst of "
        f"{rows[0].seeds} seeds is above the best of the other. "
        f"The pixel baseline is beaten in {pixels} of {len(rows)}."
    )
    return title, f"{lead} {_learned(data.curve)}".strip()


def _learned(curve: Curve | None) -> str:
    if not curve or not curve.loss:
        return ""
    below = curve.ln_k - _tail(curve.loss)
    if below > 0.05:
        return f"The loss ended {below:.2f} below ln K, so the prototypes tell images apart."
    return "The loss ended at ln K: the network has learned to tell nothing apart."


def _tail(values: Sequence[float]) -> float:
    """Mean of the last twentieth of a curve, at least one value."""
    return fmean(values[-max(1, len(values) // 20) :])


def final_loss(curve: Curve) -> float:
    """Loss minus ln K at the end (mean of the last twentieth of the logged steps)."""
    return _tail(curve.loss) - curve.ln_k


def _plural(count: int, one: str, many: str = "") -> str:
    return one if count == 1 else (many or one + "s")


REASON_TEXT = {
    "not_an_image": "Neither DICOM nor NIfTI nor a picture that a table lists.",
    "unreadable": "Damaged or cut off: no valid header.",
    "no_part10_header": "DICOM without its preamble; reading it would be guessing.",
    "dicomdir": "A directory of files, not an image.",
    "no_modality": "The header names no modality.",
    "modality_out_of_scope": "A modality that this dataset does not take.",
    "sop_class_out_of_scope": "Not an image to learn from: report, segmentation, dose, whole slide.",
    "no_pixel_data": "A header without pixels.",
    "transfer_syntax_unsupported": "Video or an unknown compression.",
    "bad_pixel_description": "Rows, columns or bits are missing or contradict each other.",
    "too_large": "Declares more pixels than the limit.",
    "decode_failed": "The compressed pixels could not be decoded.",
    "too_small": "One side has 32 pixels or fewer.",
    "constant": "A blank image: every pixel is the same.",
    "derived": "A screen save, report page or other derived picture.",
    "burned_in_risk": "High risk of names or dates written into the pixels.",
    "duplicate": "Already there: the same pixels are kept once.",
    "uid_collision": "The same instance identifier with other pixels.",
    "label_map": "A label map, vector field or atlas, not an image.",
    "not_listed": "A picture without a row in the table.",
    "source_missing": "Was there when the work was planned, gone or changed when it was read.",
    "partner_missing": "The header of a NIfTI pair without its image file beside it.",
    "unsafe_member": "A link, device or path in an archive that leads out of it.",
    "encrypted": "An archive member behind a password.",
    "nested_archive": "An archive inside an archive.",
    "crashed": "The decoder died or ran out of time on it.",
    "volume_without_geometry": "Stack in which slices lack position, orientation or spacing: no volume.",
    "volume_repeated_position": "Stack with two slices at one place: no volume, its slices are samples.",
    "volume_uneven": "Stack with a gap or with unequal steps: no volume, its slices are samples.",
}
