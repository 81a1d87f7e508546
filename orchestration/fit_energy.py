"""`medswav fit-energy`: the reference energies of the energy augmentation, as a file for several runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from orchestration.progress import Progress
from shards.errors import UserError

if TYPE_CHECKING:
    from trainer.augment.bands import BandStatistics
    from trainer.config import TrainConfig


def fit_energy(
    config: "TrainConfig", output: Path, images: int, stream: TextIO | None = None
) -> Mapping[str, "BandStatistics"]:
    """Fit the statistics of up to `images` images of each modality, and write `output`, whole or not at all.

    Raises UserError where the file is there already, or the dataset cannot be read.
    """
    from trainer.augment.bands import save_statistics
    from trainer.batches import fit_bands
    from trainer.files import disk_full_is_clear, new_attempt

    _check_new(output)
    with disk_full_is_clear("writing the band statistics"):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f"{output.name}.tmp-{new_attempt()}")
        try:
            with Progress("fit-energy", 0, "images", stream=stream) as progress:

                def look(done: int, total: int) -> None:
                    if done == 1:
                        progress.expect(total)
                    progress.update(done)

                statistics = fit_bands(config, images, look)
            save_statistics(temporary, statistics)
            _check_new(output)  # again: the fit takes minutes
            temporary.rename(output)
        finally:
            temporary.unlink(missing_ok=True)
    return statistics


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"{output} exists already: choose another name, or remove it")
