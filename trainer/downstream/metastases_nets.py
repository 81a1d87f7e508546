"""Networks for lesions in slices: the 2.5D encoder-decoder, and the classifier that is shown its mask."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from shards.errors import UserError
from shards.ids import digest
from trainer.downstream.finetune import BEST, RESULT, load_best
from trainer.models.encoders import feature_dim

MIXED = 3  # channels that the encoder is given


@dataclass(frozen=True)
class MaskShape:
    """What rebuilds a Segmenter. slices: in; width: channels of the first level, doubled on each; levels:
    resolutions; reduce: factor by which pixels are folded into channels before the first; size: px of the
    slices that it was trained on."""

    slices: int
    width: int
    levels: int
    reduce: int
    size: int


class Segmenter(nn.Module):
    """Neighbouring slices [n, slices, S, S] in [0, 1] to the logits of the middle slice's mask, [n, S, S]: an
    encoder-decoder with skips (Ronneberger et al. 2015). S is a multiple of reduce * 2**(levels - 1)."""

    def __init__(self, shape: MaskShape) -> None:
        super().__init__()
        self.shape = shape
        fold = shape.reduce**2
        widths = [shape.width << level for level in range(shape.levels)]
        inputs = [shape.slices * fold, *widths]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(inputs, widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[0], fold, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -4.0)  # lesions are a hundredth of the pixels

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_unshuffle(x, self.shape.reduce)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for level in range(len(self.up) - 1, -1, -1):
            x = self.up[level](torch.cat([kept[level], interpolate(x, scale_factor=2.0)], dim=1))
        return pixel_shuffle(self.out(x), self.shape.reduce)[:, 0]


class SliceClassifier(nn.Module):
    """Slices, and their mask where `attention`, [n, channels, S, S] to the logit of a lesion in the middle
    slice, [n]: a 1x1 convolution to 3 channels, the encoder, a linear head.

    At first each of the 3 channels is the middle slice, with the mask added to it, and a little of
    everything: a pretrained encoder sees images as it knows them, with the lesions lit up.
    """

    def __init__(self, encoder: nn.Module, slices: int, attention: bool) -> None:
        super().__init__()
        self.mix = nn.Conv2d(slices + attention, MIXED, 1)
        with torch.no_grad():
            nn.init.normal_(self.mix.weight, std=0.05)
            self.mix.weight[:, slices // 2] += 1
            if attention:
                self.mix.weight[:, slices] += 1
            assert self.mix.bias is not None
            nn.init.zeros_(self.mix.bias)
        self.encoder = encoder
        self.head = nn.Linear(feature_dim(encoder), 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.mix(x)))[:, 0]
        return out


class Detector(nn.Module):
    """Both in one, for use: slices [n, slices, S, S] to (probability of a lesion in the middle slice [n], its
    mask as probabilities [n, S, S])."""

    def __init__(self, segmenter: Segmenter, classifier: SliceClassifier) -> None:
        super().__init__()
        self.segmenter, self.classifier = segmenter, classifier

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.segmenter(slices).sigmoid()
        return self.classifier(torch.cat([slices, mask[:, None]], dim=1)).sigmoid(), mask


def mask_file(run: Path) -> Path:
    """The best network of a finished training of masks: its folder, or that of its run. Raises UserError."""
    for folder in (run, run / "fraction-1" / "seed-0"):
        if (folder / BEST).is_file() and (folder / RESULT).is_file():
            return folder / BEST
    raise UserError(
        f"{run} holds no trained mask network: train one (medswav finetune metastases-mask), and give its "
        "output as segmenter=FOLDER"
    )


def load_segmenter(run: Path) -> Segmenter:
    """The network of a training of masks, in evaluation mode, on the CPU. Raises UserError."""
    path = mask_file(run)
    network = Segmenter(_said(run)[0])
    load_best(network, path.parent)
    return network.eval().requires_grad_(False)


def patient_digests(patients: Iterable[str]) -> list[str]:
    """Of each patient once, in order: 60 bits of a digest of the pseudonym."""
    return sorted({digest(patient)[:12] for patient in patients})


def seen_patients(run: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Digests of the patients that a mask network may have been trained on, and was chosen on. UserError."""
    return _said(run)[1:]


def _said(run: Path) -> tuple[MaskShape, frozenset[str], frozenset[str]]:
    try:
        with safetensors.safe_open(mask_file(run), framework="pt") as file:
            said = json.loads(json.loads((file.metadata() or {})["finetune"])["identity"])
        return MaskShape(**said["shape"]), frozenset(said["train"]), frozenset(said["val"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError):
        raise UserError(
            f"{run} holds no mask network that says whom it was trained on: train it again, or give "
            "another segmenter"
        ) from None


def _block(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    return nn.Sequential(*layers)
