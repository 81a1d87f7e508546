"""Multi-crop by other libraries, from the bytes of an image to 8 views in uint8: for `bench augment`.

SwAV's own stack, restated from the papers (Caron et al. 2020, section 3 and appendix; its colour distortion
and blur are those of Chen et al. 2020, appendix A): random resized crops, flip .5, colour jitter (.8, .8, .8,
.2) with probability .8, grayscale .2, Gaussian blur of sigma U[.1, 2] with probability .5; 8 bits, Pillow.
MONAI: the image windowed once, then for each view a random crop, resizing, Gaussian smoothing in place of the
bands, gamma, gain and offset with our probabilities and ranges, in float32.
Both have it easier than a training run of theirs: bytes lie in memory, and the views stay uint8.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.codec import get_codec
from shards.errors import UserError
from trainer.config import IntensityConfig, ViewConfig

Make = Callable[[bytes], list[NDArray[np.uint8]]]  # bytes of an image -> [count, size, size(, 3)] a group


def torchvision_views(views: ViewConfig, colour: bool) -> Make:
    """SwAV's stack on an 8-bit image file; colour: as published, RGB; else one channel. Raises UserError."""
    from trainer.models.libraries import torchvision

    torchvision()
    from torchvision import transforms as T

    jitter = T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    blur = T.RandomApply([T.Lambda(_pillow_blur)], 0.5)
    groups = [
        T.Compose(
            [
                T.RandomResizedCrop(crop.size, scale=crop.share),
                T.RandomHorizontalFlip(0.5),
                jitter,
                T.RandomGrayscale(0.2),
                blur,
            ]
        )
        for crop in views.crops
    ]

    def make(data: bytes) -> list[NDArray[np.uint8]]:
        from PIL import Image

        image = Image.open(io.BytesIO(data)).convert("RGB" if colour else "L")
        return [
            np.stack([np.asarray(view(image)) for _ in range(crop.count)])
            for crop, view in zip(views.crops, groups, strict=True)
        ]

    return make


def _pillow_blur(image: Any) -> Any:
    """Pillow's blur: many times faster than torchvision's, which goes through float tensors."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def eight_bits(unit: NDArray[np.float32]) -> bytes:
    """An image f32[H, W] in [0, 1] as JPEG of quality 95, which decodes faster than PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.rint(unit * 255).astype(np.uint8)).save(file, "jpeg", quality=95)
    return file.getvalue()


def monai_views(views: ViewConfig, row: dict[str, Any], intensity: IntensityConfig) -> Make:
    """MONAI on an HTJ2K codestream, decoded as ours. row: statistics of the image. Raises UserError."""
    try:
        from monai import transforms as M
        from monai.data.meta_obj import set_track_meta
    except ImportError:
        raise UserError(
            "bench augment measures against monai: install it (pip install medswav[test])"
        ) from None
    set_track_meta(False)  # its bookkeeping costs time, and a crop for pretraining has no use for it
    low, high = _window(row, intensity)
    window = M.ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)
    codec = get_codec("htj2k")

    def pipeline(size: int, share: tuple[float, float], shape: tuple[int, ...]) -> Any:
        small, large = ([max(round(s * side), 1) for side in shape] for s in np.sqrt(share))
        return M.Compose(
            [
                M.RandSpatialCrop(small, max_roi_size=large, random_size=True),
                M.Resize((size, size), mode="bilinear", anti_aliasing=False),
                M.RandGaussianSmooth((0.25, 1.5), (0.25, 1.5), prob=views.energy_probability),
                M.RandAdjustContrast(views.gamma_probability, gamma=views.gamma),
                M.RandScaleIntensity(factors=0.1, prob=views.linear_probability),
                M.RandShiftIntensity(offsets=0.2, prob=views.linear_probability),
            ]
        )

    made: dict[tuple[int, ...], list[Any]] = {}

    def make(data: bytes) -> list[NDArray[np.uint8]]:
        image = window(codec.decode(data)[None].astype(np.float32))
        shape = tuple(image.shape[1:])
        if shape not in made:
            made[shape] = [pipeline(crop.plane[0], crop.share, shape) for crop in views.crops]
        return [
            np.stack([(view(image)[0].clamp(0, 1) * 255).byte().numpy() for _ in range(crop.count)])
            for crop, view in zip(views.crops, made[shape], strict=True)
        ]

    return make


def _window(row: dict[str, Any], intensity: IntensityConfig) -> tuple[float, float]:
    if intensity.mode == "fixed":
        assert intensity.center is not None and intensity.width is not None  # held by IntensityConfig
        return intensity.center - intensity.width / 2, intensity.center + intensity.width / 2
    return float(row["p005"]), float(row["p995"])
