"""How many images are mixed at a time, and whether the node's cache of shards holds them. No torch."""

from collections.abc import Mapping

from shards.cache import KEEP
from shards.order import Blocks
from trainer.config import DataConfig


def mixed_images(data: DataConfig, blocks: Blocks, images: int) -> int:
    """Images of a modality that are shuffled with each other at a time, of all virtual ranks together."""
    lanes = data.lanes if data.sampling == "equal" else 1
    return min(images, lanes * blocks.window)


def cache_warning(data: DataConfig, images: Mapping[str, int], mean_bytes: Mapping[str, float]) -> str | None:
    """A node cache that is smaller than what is mixed at a time drops a block before its other images are
    drawn. images, mean_bytes: of each modality, its number and their encoded bytes."""
    if data.node_cache is None or data.order.layout != "blocks":
        return None
    blocks = Blocks(data.order.block_samples, data.order.group_blocks)
    known = [m for m in data.modalities if m in images and m in mean_bytes]
    mixed = sum(mixed_images(data, blocks, images[m]) * mean_bytes[m] for m in known)
    needed = int(mixed / KEEP) + 1
    if not known or needed <= data.node_cache_bytes:
        return None
    return (
        f"{mixed / 1e9:.1f} GB of encoded samples are mixed at a time, more than the node cache keeps: it "
        f"would read every block many times; set data.node_cache_bytes to {needed} or more (of several "
        "nodes, each needs its part of that), or leave data.node_cache out"
    )
