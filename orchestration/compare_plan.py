"""The plan of `medswav compare`: which images, tasks, arms and seeds. A YAML file, typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.errors import UserError
from shards.settings import apply_override
from trainer.config import TrainConfig, load_config, text_setting

AnyPlan = TypeVar("AnyPlan", bound="Plan")
Name = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Strict):
    """Labels of one table: `classes` says which values of `column` are used, and as which class."""

    name: str = Name
    table: str
    column: str = "label"
    classes: dict[str, str] = Field(min_length=2)


class Arm(Strict):
    """`pretrained`: the preset with `set` on top; `hybrid`: with the labels of the tasks, those of the
    fraction that it is judged with, so one run a fraction; `random`: as initialised; `pixels`: no network."""

    name: str = Name
    kind: Literal["pretrained", "hybrid", "random", "pixels"] = "pretrained"
    set: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return self.kind in ("pretrained", "hybrid")


class Plan(Strict):
    """tables: CSVs below the data folder (columns file, modality, patient, split) that list the images."""

    tables: tuple[str, ...] = Field(min_length=1)
    modality_column: str = "modality"
    patient_column: str = "patient"
    split_column: str = "split"
    tasks: tuple[Task, ...] = Field(min_length=1)
    preset: str
    set: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    fractions: tuple[float, ...] = Field((1.0, 0.1), min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        for what, names in (("tasks", self.tasks), ("arms", self.arms)):
            if len({one.name for one in names}) != len(names):
                raise ValueError(f"{what} must have different names")
        strange = next((task.table for task in self.tasks if task.table not in self.tables), None)
        if strange is not None:
            raise ValueError(f"a task takes labels of {strange}, which tables does not list")
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError("fractions must be above 0, up to 1")
        return self

    def config(self, arm: Arm, seed: int, dataset: str, labels: Sequence[str] = ()) -> TrainConfig:
        """Of one pretraining (or, for `random`, of the network). Raises UserError."""
        extra = (
            [f"supervision.labels=[{', '.join(f'{{name: {name}}}' for name in labels)}]"] if labels else []
        )
        own = [*extra, text_setting("data.dataset", dataset), f"seed={seed}"]
        return load_config(self.preset, [*self.set, *arm.set, *own])


def load_plan(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    """A plan file with `a.b=value` overrides, of its arms those named by `only`. Raises UserError."""
    return load_as(Plan, path, overrides, only)


def load_as(
    kind: type[AnyPlan], path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> AnyPlan:
    """The same for a kind of plan."""
    if not path.is_file():
        raise UserError(
            f"the plan {path} does not exist: give a YAML file such as docs/experiments/labelled.yaml"
        )
    try:
        tree: Any = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        raise UserError(f"{path.name} is not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} must hold a mapping of settings")
    preset = tree.get("preset", "")
    if isinstance(preset, str) and preset.endswith((".yaml", ".yml")):
        tree["preset"] = str(path.parent / preset)
    for item in overrides:
        apply_override(tree, item)
    try:
        plan = kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path.name}: {where}: {text}" if where else f"{path.name}: {text}") from None
    strange = sorted(set(only) - {arm.name for arm in plan.arms})
    if strange:
        raise UserError(
            f"{path.name} has no arm {strange[0]!r}: choose from {', '.join(a.name for a in plan.arms)}"
        )
    return plan.model_copy(update={"arms": tuple(a for a in plan.arms if not only or a.name in only)})
