"""The ranks of a kill test: `torchrun -m tests.trainer.driver RUN STEP RANK`.

RANK is killed with SIGKILL when it asks for the batch of STEP.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.batches import Batch
from trainer.distributed import process_group
from trainer.loop import train


def main() -> None:
    run_dir, victim = Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))
    with process_group(torch.device("cpu")) as (rank, world):
        config = tiny()
        batches = FakeBatches(config, rank, world)

        def next_batch(step: int) -> Batch:
            if (step, rank) == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return batches(step)

        train(config, next_batch, run_dir, rank=rank, world=world, dataset_fingerprint=FINGERPRINT)


if __name__ == "__main__":
    main()
