"""One run of an experiment: `python -m orchestration.experiment_cell SPEC.json` is `medswav finetune` with
the seeds of the spec. A process of its own, with one thread; a kill costs one epoch."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.finetune_job import Request, finetune
from shards.errors import UserError


def main(arguments: Sequence[str]) -> int:
    import torch

    torch.set_num_threads(1)
    try:
        finetune(request(json.loads(Path(arguments[0]).read_text())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def request(spec: dict[str, Any]) -> Request:
    """From JSON."""
    lists = {name: tuple(spec[name]) for name in ("labels", "overrides", "fractions", "seeds")}
    return Request(**{**spec, **lists, "output": Path(spec["output"])})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
