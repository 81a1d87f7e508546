"""The 3D DenseNet for head CT (method.md section 6): volumes of any size, the box is 40 x 224 x 192.

    stem      Conv3d (1, 3, 3) to 16 channels, BatchNorm3d, LeakyReLU
    block     1    2    3    4    5
    units     1    2    3    3    3        a unit: Conv3d to 7 channels, BatchNorm3d, LeakyReLU
    kernel    (1, 3, 3)  (3, 3, 3)
    after it  (1, 2, 2)  (2, 2, 2)         mean pooling, as between the blocks of DenseNet (Huang et al. 2017)
    channels  23   37   58   79   100
    head      Conv3d (1, 1, 1) to 512, BatchNorm3d, LeakyReLU; global maximum and mean, joined to 1024

No convolution has a bias, batch norms follow: 167,480 parameters for one channel. Block 1 sees the whole
resolution: 80 GFLOP for a sample of 1 + 4 crops, forward and backward, are those of method.md section 8.
"""

import torch
from torch import Tensor, nn

UNITS = (1, 2, 3, 3, 3)
STEM, GROWTH, MAP = 16, 7, 512
FLAT = 2  # blocks that neither look across slices nor halve their number
SLICES = 2 ** (len(UNITS) - FLAT)  # slices of the volume to one of the last map


class Unit(nn.Module):
    """Convolution (same size), batch norm, LeakyReLU."""

    def __init__(self, in_width: int, width: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        same = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_width, width, kernel, padding=same, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class DenseBlock(nn.Module):
    """Each unit sees the input of the block and what all units before it gave."""

    def __init__(self, in_width: int, units: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.units = nn.Sequential(*(Unit(in_width + i * GROWTH, GROWTH, kernel) for i in range(units)))
        self.width = in_width + units * GROWTH

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([x, unit(x)], dim=1)
        return x


class DenseNet3d(nn.Module):
    """[n, C, Z, Y, X] in [0, 1] to [n, 1024]; for heads that need the place, see block_maps, feature_map
    and slice_features.

    A size that is odd before a pooling rounds up, and its last voxel is the mean of those that there are: no
    slice and no border is dropped, and a volume of one slice is one.
    """

    feature_dim = 2 * MAP

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = Unit(in_channels, STEM, (1, 3, 3))
        blocks, width = [], STEM
        for i, units in enumerate(UNITS):
            blocks.append(DenseBlock(width, units, (1, 3, 3) if i < FLAT else (3, 3, 3)))
            width = blocks[-1].width
        self.blocks = nn.ModuleList(blocks)
        self.head = Unit(width, MAP, (1, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        final = self.feature_map(x)
        return torch.cat([final.amax((2, 3, 4)), final.mean((2, 3, 4))], dim=1)

    def block_maps(self, x: Tensor) -> list[Tensor]:
        """What each block gives, before its pooling, 23 to 100 channels: the first three have all Z slices,
        then Z/2 and Z/4; in the plane the size halves from each to the next, beginning with the whole."""
        return self._through(x)[0]

    def feature_map(self, x: Tensor) -> Tensor:
        """Before the global pooling: [n, 512, Z/8, Y/32, X/32], each rounded up (5 x 7 x 6 for the box)."""
        out: Tensor = self.head(self._through(x)[1])
        return out

    def all_maps(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """block_maps and feature_map of one pass."""
        maps, last = self._through(x)
        return maps, self.head(last)

    def slice_features(self, x: Tensor) -> Tensor:
        """Features of slices [n, Z, 1024]: maximum and mean of feature_map in the plane, each of its slices
        standing for the SLICES slices of the volume that it was pooled from."""
        final = self.feature_map(x)
        pooled = torch.cat([final.amax((3, 4)), final.mean((3, 4))], dim=1)
        return pooled.repeat_interleave(SLICES, dim=2)[:, :, : x.shape[2]].transpose(1, 2)

    def _through(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        if x.ndim != 5:
            raise ValueError(f"densenet3d takes volumes [n, C, Z, Y, X], this is {list(x.shape)}")
        maps = []
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            maps.append(block(x))
            x = halved(maps[-1], (1, 2, 2) if i < FLAT else (2, 2, 2))
        return maps, x


def halved(x: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Mean pooling whose size rounds up; a side of 1 stays (torch refuses a kernel larger than a side)."""
    fitting = [min(k, side) for k, side in zip(kernel, x.shape[2:], strict=True)]
    return nn.functional.avg_pool3d(x, fitting, ceil_mode=True)
