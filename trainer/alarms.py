"""Alarms of a run: what the diagnostics say is wrong, since when, and what to do. No torch.

A pure function of the logged rows (of metrics.jsonl, or as on_metrics gets them) and the configuration, so
a resumed run and a driver that reads along come to the same alarms. docs/diagnostics.md has the table.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer import journal
from trainer.config import TrainConfig

# A sign counts when it was there in so many logged rows in a row, and is over when it was away in as many:
# a single batch decides nothing.
PATIENCE = 3

# Standard deviation of the features, of at most 1. At .15 all but 2 % of their squared length is common to
# all images. Runs on real images that learned stayed above .19 at every step, collapsed ones fell to .08.
ONE_POINT = 0.15
# Effective number of directions of the features: 1 for a line through the origin, however long. Runs on real
# images that learned stayed above 1.24 (the direction that all images share counts too).
ONE_LINE = 1.1
# exp(entropy) of a code as a share of K. A code that spreads over nearly all prototypes says nothing of its
# image; a batch that is too small for K (method.md 3-G: 303 of 3000) is still far from this.
UNIFORM_CODES = 0.95
# Share of prototypes that of late got less than a tenth of equal use. With half of them unused, half of what
# swav.prototypes asks for is not there.
DEAD_SHARE = 0.5
# Views for each prototype before one is called dead: as many as swav.diagnostics.PrototypeUse looks back.
ENOUGH_VIEWS = 10
# Loss above chance (ln K; ln(2N - 1) for SimCLR) less this much, in nats, on average over so many logged
# rows (one batch of 8 images varies by .15): nothing was learned. On real images MR, the slowest, is .1 below
# after 200 steps of a small run. It is judged after CHANCE_STEPS or CHANCE_SHARE of the run, whichever comes
# first, and never before the prototypes are free.
AT_CHANCE = 0.05
CHANCE_ROWS = 10
CHANCE_STEPS = 1000
CHANCE_SHARE = 0.1
# Mean age in steps of the queue's entries. They were made by earlier networks, with no slowly moving copy of
# it: the paper's longest queue (3840 on one GPU, batch 32) has a mean age of 60.
STALE_STEPS = 250


@dataclass(frozen=True)
class Alarm:
    """`modality`: or `all`. `sign`: one of SIGNS. `since`: the step (0-based, as in metrics.jsonl) of the
    first logged row of those that raised it."""

    modality: str
    sign: str
    since: int
    advice: str


@dataclass(frozen=True)
class Event:
    """An alarm that was raised, or is over, with the row of `step`."""

    step: int
    raised: bool
    alarm: Alarm

    def text(self) -> str:
        alarm = self.alarm
        if not self.raised:
            return f"alarm over at step {self.step}, {alarm.modality}: {TITLES[alarm.sign]} no more"
        return f"alarm, {alarm.modality} since step {alarm.since}: {TITLES[alarm.sign]}: {alarm.advice}"

    def row(self) -> dict[str, Any]:
        return {"step": self.step, "event": "raised" if self.raised else "over", **asdict(self.alarm)}


def event_of(row: Mapping[str, Any]) -> Event:
    """What Event.row gave."""
    alarm = Alarm(row["modality"], row["sign"], int(row["since"]), row["advice"])
    return Event(int(row["step"]), row["event"] == "raised", alarm)


TITLES = {
    "one_point": "features are one point (collapse)",
    "one_line": "features lie on one line (collapse)",
    "uniform_codes": "codes are uniform",
    "dead_prototypes": "most prototypes are dead",
    "loss_at_chance": "the loss is not below chance",
    "stale_queue": "the queue is stale",
}
SIGNS = tuple(TITLES)


def signs(values: Mapping[str, float | None], step: int, config: TrainConfig) -> dict[str, str | None]:
    """{sign: advice, or None where it is not there} for one modality in one logged row.

    values: its diagnostics (the names after m/<modality>/). Signs whose diagnostics are missing, or of which
    it is too early to speak, are left out.
    """
    swav = config.swav
    found: dict[str, str | None] = {}

    def judge(sign: str, name: str, bad: Any, advice: str) -> None:
        value = values.get(name)
        if value is not None and math.isfinite(value):
            found[sign] = advice.format(value=value) if bad(value) else None

    judge("one_point", "feature_std", lambda v: v < ONE_POINT, COLLAPSE)
    if not found.get("one_point"):  # a point lies on a line
        judge("one_line", "effective_rank", lambda v: v < ONE_LINE, COLLAPSE)
    judge("uniform_codes", "target_perplexity", lambda v: v > UNIFORM_CODES * swav.prototypes, UNIFORM)
    if step >= _enough_views(config) and step >= swav.freeze_prototypes_steps:
        judge("dead_prototypes", "dead_share", lambda v: v > DEAD_SHARE, DEAD)
    if step >= _chance_steps(config):
        chance = "ln K" if config.method == "swav" else "ln(2N - 1)"
        judge(
            "loss_at_chance",
            BELOW[config.method],
            lambda v: v > -AT_CHANCE,
            AT_LN_K.replace("CHANCE", chance),
        )
    judge("stale_queue", "queue_age_steps", lambda v: v > STALE_STEPS, STALE)
    return found


BELOW = {"swav": "loss_minus_ln_k", "simclr": "loss_minus_chance"}
COLLAPSE = (
    "lower optim.learning_rate or optim.weight_decay, or freeze the prototypes longer "
    "(swav.freeze_prototypes_steps); if the codes are uniform too, lower swav.epsilon"
)
UNIFORM = "lower swav.epsilon, or freeze the prototypes longer (swav.freeze_prototypes_steps)"
DEAD = (
    "{value:.0%} of them are hardly used: lower swav.prototypes, raise swav.epsilon, or freeze them longer "
    "(swav.freeze_prototypes_steps)"
)
AT_LN_K = (
    "it is CHANCE {value:+.2f}, nothing was learned yet: look at the crops (do they still show the same "
    "thing?), change optim.learning_rate, or lower swav.prototypes or swav.epsilon"
)
STALE = (
    "its entries are {value:.0f} steps old on average, of networks of long ago: shorten swav.queue_length or "
    "raise data.batch_size"
)


@dataclass
class _Streak:
    """Rows in a row with the sign (`there`) or without (`away`)."""

    there: int = 0
    away: int = 0
    since: int = 0
    active: Alarm | None = None


@dataclass
class Watch:
    """Goes through the logged rows in the order of their steps; a row of a step that was seen is ignored."""

    config: TrainConfig
    _last: int = -1
    _streaks: dict[tuple[str, str], _Streak] = field(default_factory=dict)
    _losses: dict[str, deque[float]] = field(default_factory=dict)

    @property
    def active(self) -> list[Alarm]:
        return [s.active for s in self._streaks.values() if s.active is not None]

    def add(self, row: Mapping[str, float | None]) -> list[Event]:
        """What the row raises and ends."""
        step = int(row["step"] or 0)
        if step <= self._last:
            return []
        self._last = step
        events = []
        for group in self.config.groups:
            start = f"m/{group}/"
            values = {k[len(start) :]: v for k, v in row.items() if k.startswith(start)}
            values |= self._mean_loss(group, step, values)
            for sign, advice in signs(values, step, self.config).items():
                streak = self._streaks.setdefault((group, sign), _Streak())
                event = _follow(streak, group, sign, step, advice)
                events += [event] if event else []
        return events

    def _mean_loss(
        self, group: str, step: int, values: Mapping[str, float | None]
    ) -> dict[str, float | None]:
        """The loss below chance over the last CHANCE_ROWS rows that count, None where they are fewer."""
        name = BELOW[self.config.method]
        value = values.get(name)
        if value is None or not math.isfinite(value) or step < _chance_steps(self.config):
            return {}
        window = self._losses.setdefault(group, deque(maxlen=CHANCE_ROWS))
        window.append(value)
        return {name: fmean(window) if len(window) == CHANCE_ROWS else None}


def _follow(streak: _Streak, group: str, sign: str, step: int, advice: str | None) -> Event | None:
    if advice is None:
        streak.there, streak.away = 0, streak.away + 1
        if streak.active is not None and streak.away >= PATIENCE:
            event = Event(step, False, streak.active)
            streak.active = None
            return event
        return None
    streak.since = step if streak.there == 0 else streak.since
    streak.there, streak.away = streak.there + 1, 0
    if streak.active is None and streak.there >= PATIENCE:
        streak.active = Alarm(group, sign, streak.since, advice)
        return Event(step, True, streak.active)
    return None


def alarms(history: Iterable[Mapping[str, float | None]], config: TrainConfig) -> list[Alarm]:
    """What is wrong at the end of `history`, logged rows in the order of their steps."""
    watch = Watch(config)
    for row in history:
        watch.add(row)
    return watch.active


def alarms_path(run_dir: Path) -> Path:
    return run_dir / "alarms.jsonl"


def watch_of(run_dir: Path, config: TrainConfig) -> Watch:
    """As it is after the rows of metrics.jsonl."""
    watch = Watch(config)
    for row in journal.read(journal.journal_path(run_dir)):
        watch.add(row)
    return watch


def _enough_views(config: TrainConfig) -> float:
    """The step by which every prototype had a fair chance to be used."""
    views = config.data.batch_size // len(config.groups) * config.views.n_crops
    return ENOUGH_VIEWS * config.swav.prototypes / views * config.log_every_steps


def _chance_steps(config: TrainConfig) -> float:
    steps = min(CHANCE_STEPS, CHANCE_SHARE * config.max_steps)
    return max(steps, config.swav.freeze_prototypes_steps) if config.method == "swav" else steps
