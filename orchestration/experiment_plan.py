"""The plan of `medswav evaluate experiment`: images, tasks, arms, seeds and label fractions. A YAML file.

It is a plan of `medswav compare` (tables, tasks, preset, set) whose arms are fine-tuned.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestration.compare_plan import Name, Plan, Strict
from orchestration.finetune_job import configured
from trainer.config import TrainConfig, load_config, text_setting


class Arm(Strict):
    """`pretrained`: by the preset, on the training split, or given encoders; `random`: the same network as
    initialised; `library`: published weights, torchvision:..., left out where they are not to be had;
    `pixels`: a linear head on the bare image. set: more settings of `finetune classify`."""

    name: str = Name
    kind: Literal["pretrained", "random", "library", "pixels"] = "pretrained"
    weights: str = ""
    set: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _weights_of_a_library(self) -> "Arm":
        if (self.kind == "library") != bool(self.weights):
            raise ValueError("weights goes with kind library, which needs it (torchvision:...)")
        return self


class Experiment(Plan):
    """pretraining_seeds: of the encoders that are made where none are given; the fine-tuning of seed s takes
    the s-th of them (modulo their number). finetune: settings of `finetune classify`, of every arm."""

    arms: tuple[Arm, ...] = Field(min_length=1)  # type: ignore[assignment]
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    fractions: tuple[float, ...] = Field((1.0, 0.5, 0.25, 0.1), min_length=1)
    pretraining_seeds: tuple[int, ...] = Field((0,), min_length=1)
    finetune: tuple[str, ...] = ()

    def pretraining(self, seed: int, dataset: str) -> TrainConfig:
        """Raises UserError."""
        own = [text_setting("data.dataset", dataset), f"seed={seed}"]
        return load_config(self.preset, [*self.set, *own])

    def settings(self, arm: Arm, network: TrainConfig) -> tuple[str, ...]:
        """Overrides of `finetune classify` for an arm. network: whose size and intensities all arms take.
        Raises UserError for settings that cannot be."""
        data = network.data.intensity
        intensity = ", ".join(f"{m}: {_flow(one.model_dump())}" for m, one in data.items())
        size = f"size={network.views.whole_image_size}"
        given: Sequence[str] = (size,)
        if arm.kind == "random":
            model = network.model
            given = (size, f"backbone={model.backbone}", f"in_channels={model.in_channels}")
        if arm.kind == "pixels":
            given = (size, "features=pixels", "mode=frozen")
        own = (f"intensity={{{intensity}}}",) if arm.kind in ("random", "pixels") else ()
        found = (*given, *own, *self.finetune, *arm.set)
        configured("classify", "small", found)
        return found


def _flow(tree: Mapping[str, Any]) -> str:
    """As YAML in one line."""
    return "{" + ", ".join(f"{k}: {'null' if v is None else v}" for k, v in tree.items()) + "}"
