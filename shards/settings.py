"""`--set a.b=value`, the one way to change a setting from a command line."""

from typing import Any

import yaml

from shards.errors import UserError


def apply_override(tree: dict[str, Any], item: str) -> None:
    """Put `a.b=value` into a tree of settings, in place; value is YAML. Raises UserError."""
    name, separator, value = item.partition("=")
    if not separator or not name:
        raise UserError(f"--set {item!r}: write it as a.b=value")
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {name}: {parent} holds no settings below it")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {name}: {value!r} is not a valid value") from None
