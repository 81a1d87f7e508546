"""The settings of the data side: what is read, and the views of an image. Part of trainer.config."""

from math import prod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pixels = Annotated[int, Field(gt=0)]
Probability = float
Range = tuple[float, float]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IntensityConfig(Strict):
    """How stored pixels become [0, 1]. `recorded`: the DICOM window, percentiles where there is none;
    `fixed`: `center` and `width`; `percentile`: the 0.5th to the 99.5th percentile of the image."""

    mode: Literal["recorded", "fixed", "percentile"] = "percentile"
    center: float | None = None
    width: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fixed_needs_window(self) -> "IntensityConfig":
        if (self.mode == "fixed") != (self.center is not None and self.width is not None):
            raise ValueError("center and width go with mode=fixed, and mode=fixed needs both")
        return self


_HEAD = IntensityConfig(mode="fixed", center=55, width=200)  # method.md section 6


class OrderConfig(Strict):
    """The order of samples (shards.order). `blocks`: samples as they lie in the shards, in blocks of
    `block_samples` neighbours; `group_blocks` blocks are shuffled with each other, and a modality that has no
    more samples than that is shuffled as a whole. `keys`: single samples by key, far from each other on disk,
    as in runs that began before there were blocks; the two numbers are not used then.
    """

    layout: Literal["blocks", "keys"] = "blocks"
    block_samples: int = Field(default=16, gt=0)
    group_blocks: int = Field(default=64, gt=0)


class DataConfig(Strict):
    """What is read. `batch_size` is global: of all ranks.

    `virtual_ranks`: equal parts of a batch, which the ranks share; the batches are the same for every number
    of ranks that divides it. None: as many as there are images of a modality in a batch (of all modalities,
    where `sampling` is not equal). With `sampling=equal` each reads a group of blocks of its own at a time.

    `sampling` (method.md 3-E): `equal` puts batch_size/len(modalities) images of each modality in every batch
    of every rank; `proportional` follows the number of images of each; `temperature` follows their
    sampling_temperature-th root: 1 is proportional, a large one nearly equal.
    """

    dataset: str = ""
    modalities: tuple[str, ...] = ("xr", "ct", "mr", "us")
    split: Literal["train", "val", "test", "all"] = "train"
    batch_size: int = Field(default=32, gt=0)  # open point C: its multiples are the valid queue lengths
    sampling: Literal["equal", "proportional", "temperature"] = "equal"  # open point E
    sampling_temperature: float | None = Field(default=None, ge=1)  # open point E
    intensity: dict[str, IntensityConfig] = {"ct": IntensityConfig(mode="recorded")}
    order: OrderConfig = OrderConfig()
    virtual_ranks: int | None = Field(default=None, gt=0)
    cache_bytes: int = Field(default=256 << 20, ge=0)  # decoded images and their bands, per worker process
    read_threads: int = Field(default=4, ge=0)  # reads at a time of a worker process, ahead of decoding
    read_ahead_bytes: int = Field(default=64 << 20, ge=0)  # encoded images read and not yet decoded
    # A folder of the node for catalogues that its processes share; auto: temporary, for many rows; none
    catalogue_cache: str = Field(default="auto", min_length=1)
    node_cache: str | None = None  # a folder on a disk of the node: blocks of shards, shared by its processes
    node_cache_bytes: int = Field(default=64 << 30, ge=1 << 30)  # the files in that folder

    def intensity_of(self, modality: str) -> IntensityConfig:
        """As set; head CT volumes that are not named have the window of the 3D network."""
        return self.intensity.get(modality, _HEAD if modality == "ct_volumes" else IntensityConfig())

    @property
    def per_modality(self) -> int:
        """B/M: images of one modality in a global batch, with sampling=equal."""
        return self.batch_size // len(self.modalities)

    @property
    def lanes(self) -> int:
        """The virtual ranks: equal parts of a modality's subset (of the batch, with another sampling)."""
        return self.virtual_ranks or (self.per_modality if self.sampling == "equal" else self.batch_size)

    @model_validator(mode="after")
    def _equal_subsets(self) -> "DataConfig":
        count = len(self.modalities)
        if count == 0 or len(set(self.modalities)) != count:
            raise ValueError("data.modalities must name at least one modality, each once")
        if (self.sampling == "temperature") != (self.sampling_temperature is not None):
            raise ValueError(
                "sampling_temperature goes with sampling=temperature, which needs it (2 is the square root)"
            )
        if self.sampling == "equal" and self.batch_size % count:
            low = self.batch_size - self.batch_size % count
            raise ValueError(
                f"data.batch_size={self.batch_size} is no multiple of the {count} modalities: "
                f"use {max(low, count)} or {low + count}"
            )
        shared = self.per_modality if self.sampling == "equal" else self.batch_size
        if shared % self.lanes:
            of = " of each modality" if self.sampling == "equal" else ""
            raise ValueError(
                f"data.virtual_ranks={self.lanes} does not divide the {shared} images{of} in a batch: use a "
                f"divisor of {shared}"
            )
        return self


class CropConfig(Strict):
    """One group of crops of equal size. `share` is the fraction of the (border-cropped) image area that a
    crop covers, drawn uniformly; it is used by geometry `recommended` only. Of a volume a crop is cut in the
    plane and keeps all slices."""

    count: int = Field(gt=0)
    size: Pixels | tuple[Pixels, Pixels]  # px: the side of a square; of volumes also (rows, columns)
    share: Range = (0.14, 1.0)

    @property
    def plane(self) -> tuple[int, int]:
        """(rows, columns)."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def size_text(self) -> str:
        """224, or 224x192 where it is no square."""
        return str(self.size) if isinstance(self.size, int) else "x".join(map(str, self.size))

    @model_validator(mode="after")
    def _share_is_a_fraction(self) -> "CropConfig":
        if not 0 < self.share[0] <= self.share[1] <= 1:
            raise ValueError(f"share={list(self.share)} must be a rising range of fractions above 0, up to 1")
        return self


class VolumeConfig(Strict):
    """How volumes become boxes and views (trainer.volumes, docs/volumes.md): the 3D column of Table I.

    head_crop: the head fills the box; false: the whole volume does. threshold: what is denser is patient, in
    HU, or in stored units of another modality. size_range: (rows, columns) of the plane after rescaling, from
    the smallest to the largest, for geometry `paper`.
    """

    box: tuple[Pixels, Pixels, Pixels] = (40, 224, 192)  # slices, rows, columns
    head_crop: bool = True
    threshold: float = -200.0
    size_range: tuple[tuple[Pixels, Pixels], tuple[Pixels, Pixels]] = ((112, 96), (250, 200))

    @model_validator(mode="after")
    def _rising(self) -> "VolumeConfig":
        (rows, columns), (most_rows, most_columns) = self.size_range
        if rows > most_rows or columns > most_columns:
            raise ValueError("size_range must rise from the smallest (rows, columns) to the largest")
        return self


class ViewConfig(Strict):
    """Multi-crop and the five augmentations, in their order: rescale, energy, gamma, linear, crop
    (method.md sections 2, 3-A, 3-B, 3-H). Open points: A `geometry`, the size ranges and the shares; B the
    order, the probabilities and their ranges; H `sigmas` and `band_statistics`."""

    geometry: Literal["paper", "recommended"] = "recommended"
    size_range: dict[str, Range] = {}  # px of the longer side per modality; geometry=paper only
    default_size_range: Range = (600.0, 1200.0)
    border: Range = (0.1, 0.1)  # fraction of height, width removed at each side before cropping
    crops: tuple[CropConfig, ...] = (
        CropConfig(count=2, size=224, share=(0.14, 1.0)),
        CropConfig(count=6, size=92, share=(0.05, 0.14)),
    )
    sigmas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    energy_probability: Probability = Field(default=0.8, ge=0, le=1)
    gamma_probability: Probability = Field(default=0.5, ge=0, le=1)
    gamma: Range = (1.8, 2.6)
    linear_probability: Probability = Field(default=0.5, ge=0, le=1)
    linear_gain: Range = (0.9, 1.1)
    linear_offset: Range = (-0.2, 0.2)
    band_statistics: str | None = None  # file of `medswav fit-energy`; None: RUN/bands.json, fitted at start
    volume: VolumeConfig | None = None  # the modalities are volumes; None: images

    @model_validator(mode="after")
    def _possible(self) -> "ViewConfig":
        if not all(0 <= b < 0.5 for b in self.border):
            raise ValueError(f"border={list(self.border)} must be fractions below 0.5 of each side")
        for low, high in (self.default_size_range, *self.size_range.values()):
            if not 1 <= low <= high:
                raise ValueError("size ranges must be rising ranges of pixels, from 1 on")
        for name in ("gamma", "linear_gain", "linear_offset"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name}={[low, high]} must be a rising range")
        if not self.gamma[0] > 0:
            raise ValueError(f"gamma={list(self.gamma)} must be above 0")
        if not self.crops:
            raise ValueError("crops must name at least one group")
        if self.volume is None and any(not isinstance(c.size, int) for c in self.crops):
            raise ValueError(
                "crops of (rows, columns) are cut from volumes: give one number, or set views.volume={}"
            )
        if self.volume is not None and self.size_range:
            raise ValueError("size_range is for images: set views.volume.size_range")
        if not 1 <= len(self.sigmas) <= 16 or not all(sigma > 0 for sigma in self.sigmas):
            raise ValueError("sigmas must be 1 to 16 positive numbers of pixels")
        return self

    @property
    def n_crops(self) -> int:
        return sum(c.count for c in self.crops)

    @property
    def crop_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each group of crops, in their order: (rows, columns), or (slices, rows, columns) of volumes."""
        depth = () if self.volume is None else (self.volume.box[0],)
        return tuple((*depth, *crop.plane) for crop in self.crops)

    def stack_shapes(self, n: int) -> list[tuple[int, ...]]:
        """Of the uint8 arrays of n samples: (count, n, *crop shape) of each group of crops."""
        return [(c.count, n, *shape) for c, shape in zip(self.crops, self.crop_shapes, strict=True)]

    @property
    def crop_values(self) -> int:
        """Pixels, or voxels, of all crops of a sample: its bytes as uint8."""
        return sum(map(prod, self.stack_shapes(1)))

    @property
    def crops_text(self) -> str:
        """Such as 2 x 224 + 6 x 92."""
        return " + ".join(f"{c.count} x {c.size_text}" for c in self.crops)

    @property
    def whole_size(self) -> int | tuple[int, int, int]:
        """Of a whole sample for evaluation: the side of an image in px, or the box of a volume."""
        return self.whole_image_size if self.volume is None else self.volume.box

    @property
    def whole_image_size(self) -> int:
        """Side in px of a whole image at the scale of an average large crop, for evaluation.

        A network is best where things are as large as in training; a whole image squeezed to the crop's own
        size shows them smaller (Touvron et al., Fixing the train-test resolution discrepancy, 2019). 512 at
        the most: probes hold all images of a modality in memory.
        """
        if self.geometry == "paper":
            return min(round(sum(self.default_size_range) / 2), 512)
        large = max(self.crops, key=lambda crop: crop.plane)
        inside = (1 - 2 * self.border[0]) * (1 - 2 * self.border[1])
        return min(round(large.plane[0] / (sum(large.share) / 2 * inside) ** 0.5), 512)
