"""Presets: YAML files of settings whose head comment says what they are for and how to run them."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from shards.errors import UserError
from trainer.config_data import Strict


class PresetAbout(Strict):
    """`about:` of a preset: no setting, only what is known of the data that it was written for.

    images: published number of images of each modality, for `medswav pretrain --explain` without a dataset.
    """

    images: dict[str, int] = Field(default={})


def preset_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def preset_text(preset: str) -> str:
    """The file of a preset's name, or of a path that ends in .yaml. Raises UserError."""
    if preset.endswith((".yaml", ".yml")):
        path = Path(preset)
        if not path.is_file():
            raise UserError(f"config file {preset} does not exist")
        return path.read_text()
    if preset not in preset_names():
        raise UserError(f"no preset is called {preset!r}: choose from {', '.join(preset_names())}")
    return str((_folder() / f"{preset}.yaml").read_text())


def preset_settings(preset: str) -> dict[str, Any]:
    """The tree of settings. Raises UserError."""
    return {name: value for name, value in _tree(preset).items() if name != "about"}


def preset_about(preset: str) -> PresetAbout:
    """Raises UserError."""
    try:
        return PresetAbout.model_validate(_tree(preset).get("about") or {})
    except ValidationError as error:
        raise UserError(f"about of {preset}: {error.errors()[0]['msg']}") from None


def preset_description(preset: str) -> str:
    """The head comment, without its marks. The first line is a summary."""
    lines = []
    for line in preset_text(preset).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()


def _tree(preset: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(preset_text(preset)) or {}
    except yaml.YAMLError:
        raise UserError(f"{preset} is not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{preset} must hold a mapping of settings")
    return tree


def _folder() -> Any:
    return resources.files("trainer") / "presets"
