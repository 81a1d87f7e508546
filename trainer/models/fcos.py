"""FCOS with a feature pyramid on the stages of a ResNet: Tian et al. 2019 (arXiv:1904.01355), Lin et al.
2017.

Points of the pyramid predict the class, the distances to the four sides of a box (l, t, r, b) and how central
they are. Pyramid, head and its losses (focal, GIoU, binary cross-entropy) are torchvision's. Written here:
the assignment of points to boxes and the detections, for all images at once, because torchvision's go image
by image inside a class that resizes too; and the suppression of double detections, because torchvision's is a
compiled operator that does not load beside the CPU build of torch (trainer.models.libraries).

Boxes are x0, y0, x1, y1 in continuous px of the input, x0 < x1, y0 < y1. P: points of all levels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shards.errors import UserError
from trainer.models import libraries
from trainer.models.layout import channels_last

STAGES = ("layer2", "layer3", "layer4")  # C3 to C5
EXTRA_LEVELS = 2  # P6 and P7, of stride 2 each
GROUPS = 32  # of the group norms of torchvision's head: its width is a multiple
CENTRE_RADIUS = 1.5  # strides from the centre of a box within which a point may be assigned to it
SCALES = (4.0, 8.0)  # a level of stride s has the boxes whose farthest side is 4 s to 8 s from the point


class Outputs(NamedTuple):
    """logits [n, P, K]; distances [n, P, 4], in strides; centerness [n, P, 1], a logit; sizes: height and
    width of each level."""

    logits: Tensor
    distances: Tensor
    centerness: Tensor
    sizes: tuple[tuple[int, int], ...]


class Detections(NamedTuple):
    """Of one image, from the highest score down: boxes f32 [d, 4], scores f32 [d], labels int64 [d]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Fcos(nn.Module):
    """[n, C, H, W] in [0, 1] to Outputs. encoder: a ResNet of ours or of torchvision. Raises UserError."""

    def __init__(self, encoder: nn.Module, classes: int, width: int = 256, convolutions: int = 4) -> None:
        super().__init__()
        if width % GROUPS:
            raise UserError(
                f"a pyramid of width {width} does not fit its norms: choose a multiple of {GROUPS}"
            )
        ops = libraries.torchvision().ops.feature_pyramid_network
        widths, strides = _stages(encoder)
        last = strides[-1]
        self.strides = (*strides, *(last << (i + 1) for i in range(EXTRA_LEVELS)))
        self.encoder = encoder
        self.pyramid = ops.FeaturePyramidNetwork(widths, width, ops.LastLevelP6P7(width, width))
        self.head = _head(width, classes, convolutions)

    def forward(self, x: Tensor) -> Outputs:
        maps = OrderedDict(zip(STAGES, stage_maps(self.encoder, x), strict=True))
        levels = list(self.pyramid(maps).values())
        found = self.head(levels)
        sizes = tuple((int(m.shape[2]), int(m.shape[3])) for m in levels)
        return Outputs(found["cls_logits"], found["bbox_regression"], found["bbox_ctrness"], sizes)

    def losses(self, found: Outputs, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """classification, bbox_regression, bbox_ctrness: sums over the batch divided by its assigned points.
        Of each image: boxes f32 [t, 4], labels int64 [t]."""
        cells, level = grid(found.sizes, self.strides, found.logits.device)
        matched = assign(cells, level, boxes)
        targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]
        outputs = {
            "cls_logits": found.logits,
            "bbox_regression": found.distances,
            "bbox_ctrness": found.centerness,
        }
        losses: dict[str, Tensor] = self.head.compute_loss(
            targets, outputs, [cells] * len(boxes), list(matched)
        )
        return losses

    @torch.no_grad()
    def detections(
        self,
        found: Outputs,
        shape: tuple[int, int],
        *,
        most: int = 50,
        candidates: int = 200,
        threshold: float = 0.01,
        overlap: float = 0.5,
    ) -> list[Detections]:
        """Of images of `shape` (height, width): the `most` best of each. A score is the geometric mean of
        class probability and centerness; only the `candidates` best above the threshold go through
        `suppressed`."""
        cells, _ = grid(found.sizes, self.strides, found.logits.device)
        scores = (found.logits.float().sigmoid() * found.centerness.float().sigmoid()).sqrt()
        classes = scores.shape[2]
        best, place = scores.flatten(1).topk(min(candidates, scores[0].numel()), dim=1)
        point, label = place // classes, place % classes
        distances = found.distances.float().gather(1, point[..., None].expand(-1, -1, 4))
        boxes = decode(cells[point], distances)
        height, width = shape
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        boxes = boxes.clamp(min=0).minimum(limit)
        proper = (best > threshold) & (boxes[..., 2:] > boxes[..., :2]).all(2)
        kept = proper & suppressed(boxes, label, proper, overlap).logical_not()
        out = []
        for i in range(len(kept)):
            chosen = kept[i].nonzero()[:most, 0]
            out.append(Detections(boxes[i, chosen], best[i, chosen], label[i, chosen]))
        return out


def stage_maps(encoder: Any, x: Tensor) -> list[Tensor]:
    """The outputs of STAGES, [n, width, H / stride, W / stride]."""
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(channels_last(x)))))
    maps = {}
    for name in ("layer1", *STAGES):
        x = maps[name] = getattr(encoder, name)(x)
    return [maps[name] for name in STAGES]


def grid(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Cells f32 [P, 4] (a box of a stride's side about each point; point (i, j) lies at (j + 1/2, i + 1/2)
    strides) and the level of each, int64 [P]; row by row, level by level."""
    cells, levels = [], []
    for number, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        y = torch.arange(height, device=device, dtype=torch.float32) * stride
        x = torch.arange(width, device=device, dtype=torch.float32) * stride
        corner = torch.stack([x.repeat(height), y.repeat_interleave(width)], 1)
        cells.append(torch.cat([corner, corner + stride], 1))
        levels.append(torch.full((height * width,), number, device=device))
    return torch.cat(cells), torch.cat(levels)


def assign(cells: Tensor, level: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Which box of its image a point has to predict, int64 [n, P]; -1: none.

    The point lies in the box, within CENTRE_RADIUS strides of its centre (in x and in y), and the farthest
    side is SCALES strides away; the first level takes all that is nearer, the last all that is farther. Of
    several boxes the smallest.
    """
    most = max((len(b) for b in boxes), default=0)
    if not most:
        return level.new_full((len(boxes), len(cells)), -1)
    padded = torch.stack([nn.functional.pad(b, (0, 0, 0, most - len(b))) for b in boxes])[:, None]
    point = (cells[:, :2] + cells[:, 2:])[None, :, None] / 2  # [1, P, 1, 2]
    stride = (cells[:, 2] - cells[:, 0])[None, :, None]
    low, high = padded[..., :2], padded[..., 2:]  # [n, 1, t, 2]
    sides = torch.cat([point - low, high - point], 3)  # [n, P, t, 4]: l, t, r, b
    central = (point - (low + high) / 2).abs().amax(3) < CENTRE_RADIUS * stride
    farthest, of_level = sides.amax(3), level[None, :, None]
    above = (farthest > SCALES[0] * stride) | (of_level == 0)
    below = (farthest <= SCALES[1] * stride) | (of_level == int(level[-1]))
    possible = (sides.amin(3) > 0) & central & above & below  # a padded box has no inside
    area = torch.where(possible, (high - low).prod(3), torch.inf)
    smallest, index = area.min(2)
    return torch.where(smallest.isfinite(), index, -1)


def decode(cells: Tensor, distances: Tensor) -> Tensor:
    """Boxes [..., 4] of distances in strides [..., 4] from the points of cells [..., 4]; the inverse of
    `encode`."""
    point, stride = (cells[..., :2] + cells[..., 2:]) / 2, cells[..., 2:] - cells[..., :2]
    return torch.cat([point - distances[..., :2] * stride, point + distances[..., 2:] * stride], -1)


def encode(cells: Tensor, boxes: Tensor) -> Tensor:
    """l, t, r, b in strides [..., 4] of boxes [..., 4]; negative where the point lies outside."""
    point, stride = (cells[..., :2] + cells[..., 2:]) / 2, cells[..., 2:] - cells[..., :2]
    return torch.cat([(point - boxes[..., :2]) / stride, (boxes[..., 2:] - point) / stride], -1)


def suppressed(boxes: Tensor, labels: Tensor, there: Tensor, overlap: float) -> Tensor:
    """Non-maximum suppression of all images at once, bool [n, d]: the boxes of which a better one of the same
    label, itself not suppressed, covers an IoU above `overlap`.

    boxes [n, d, 4] and labels [n, d] from the highest score down; those that are not `there` suppress
    nothing.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(2)
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(3)
    # Without a division: IoU > overlap, and never for two boxes without area.
    hit = common > overlap * (area[:, :, None] + area[:, None] - common)
    hit &= labels[:, :, None] == labels[:, None]
    hit = hit.triu(1)
    kept = there.clone()
    for i in range(boxes.shape[1]):
        kept &= ~(hit[:, i] & kept[:, i : i + 1])
    return there & ~kept


def _stages(encoder: nn.Module) -> tuple[list[int], list[int]]:
    """Widths and strides of STAGES. Raises UserError for a network without them."""
    wanted = ("conv1", "bn1", "relu", "maxpool", "layer1", *STAGES)
    if not all(hasattr(encoder, name) for name in wanted):
        raise UserError(
            f"the detector needs the stages of a ResNet, and {type(encoder).__name__} has none: use an "
            "encoder such as resnet50w2 or torchvision:resnet50"
        )
    first = next(encoder.parameters())
    side = 128
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        maps = stage_maps(encoder, first.new_zeros(1, first.shape[1], side, side))
    encoder.train(training)
    return [m.shape[1] for m in maps], [side // m.shape[2] for m in maps]


def _head(width: int, classes: int, convolutions: int) -> Any:
    """torchvision's, one prediction a point. Boxes begin with sides of two strides: a side that begins at 0
    may stay there, as its ReLU gives no gradient."""
    from torchvision.models.detection.fcos import FCOSHead

    head = FCOSHead(width, 1, classes, convolutions)
    nn.init.ones_(head.regression_head.bbox_reg.bias)
    return head
