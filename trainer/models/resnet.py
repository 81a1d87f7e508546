"""ResNets (He et al. 2016) with torchvision's state-dict keys, without its classifier.

Widening (w2, w4) is SwAV's: the stem and every convolution of every stage are 2 or 4 times as wide, so the
features are 4096 or 8192; torchvision's wide_resnet50_2 widens only the middle convolution of a block.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainer.models.layout import channels_last

_DEPTHS: dict[str, tuple[bool, tuple[int, ...], int]] = {  # bottleneck blocks?, blocks per stage, widening
    "resnet18": (False, (2, 2, 2, 2), 1),
    "resnet50": (True, (3, 4, 6, 3), 1),
    "resnet152": (True, (3, 8, 36, 3), 1),
    "resnet50w2": (True, (3, 4, 6, 3), 2),
    "resnet50w4": (True, (3, 4, 6, 3), 4),
}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """The stride sits in the 3x3 convolution, as in torchvision."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = width * self.expansion
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_width, out_width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """[n, C, H, W] in [0, 1] to globally average-pooled features [n, feature_dim].

    `stem="image"` is torchvision's: 7x7 of stride 2 and a max pooling. `stem="small"` is a 3x3 convolution
    of stride 2 for crops of a few dozen pixels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        width: int = 64,
        in_channels: int = 1,
        stem: str = "image",
    ) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            if stem == "image"
            else _conv3(in_channels, width, 2)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "image" else nn.Identity()
        current = width
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(current, width << i, 2 if i > 0 and j == 0 else 1))
                current = (width << i) * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.feature_dim = current
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(channels_last(x)))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_backbone(name: str, in_channels: int = 1) -> ResNet:
    """`resnet-tiny`, resnet18, resnet50, resnet152, resnet50w2 or resnet50w4, freshly initialised."""
    if name == "resnet-tiny":
        return ResNet(BasicBlock, (1, 1, 1, 1), width=16, in_channels=in_channels, stem="small")
    bottleneck, depths, widening = _DEPTHS[name]
    block: Any = Bottleneck if bottleneck else BasicBlock
    return ResNet(block, depths, width=64 * widening, in_channels=in_channels)


def _conv3(in_width: int, out_width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, stride, 1, bias=False)


def _shortcut(in_width: int, out_width: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_width == out_width:
        return None
    return nn.Sequential(nn.Conv2d(in_width, out_width, 1, stride, bias=False), nn.BatchNorm2d(out_width))
