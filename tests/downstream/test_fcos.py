"""The detector: points and their boxes, boxes there and back, double detections, gradients, one image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from trainer.evaluate.froc import iou
from trainer.models import libraries
from trainer.models.encoders import build_encoder
from trainer.models.fcos import Fcos, Outputs, assign, decode, encode, grid, suppressed

SIZES, STRIDES = ((8, 8), (4, 4), (2, 2)), (8, 16, 32)  # of an image of 64 px


def detector(classes=2, seed=0, width=32) -> Fcos:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Fcos(build_encoder("resnet-tiny"), classes, width, 1)


def points_of(boxes) -> list[tuple[int, float, float]]:
    """Level and place of the points that are assigned to the box of each, by hand-made boxes of one image."""
    cells, level = grid(SIZES, STRIDES)
    matched = assign(cells, level, [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)])[0]
    centre = (cells[:, :2] + cells[:, 2:]) / 2
    return [(int(level[i]), *centre[i].tolist(), int(matched[i])) for i in (matched >= 0).nonzero()[:, 0]]


def test_a_box_goes_to_the_level_of_its_size_and_to_points_near_its_centre():
    # 16 px wide: sides of at most 64 px belong to the first level; points at 4, 12, 20, ...
    assert points_of([[12, 12, 28, 28]]) == [
        (0, 20.0, 20.0, 0)
    ]  # 12 and 28 lie on the border, which is not inside
    small = points_of([[10, 10, 30, 30]])
    assert small == [(0, x, y, 0) for y in (12.0, 20.0, 28.0) for x in (12.0, 20.0, 28.0)]
    # 160 px: the farthest side is 64 to 128 px away from points 8, 24, ... of stride 16
    large = points_of([[-70, 10, 90, 40]])
    assert large and {p[0] for p in large} == {1}
    assert all(abs(x - 10) < 24 and abs(y - 25) < 24 for _, x, y, _ in large)
    assert points_of([]) == []


def test_of_two_boxes_the_smaller_has_the_point_and_images_do_not_mix():
    both = points_of([[0, 0, 60, 60], [20, 20, 40, 40]])
    assert {p[3] for p in both if 22 < p[1] < 38 and 22 < p[2] < 38} == {1}
    cells, level = grid(SIZES, STRIDES)
    one, two = torch.tensor([[10.0, 10, 30, 30]]), torch.tensor([[40.0, 40, 60, 60], [0, 0, 9, 9]])
    together = assign(cells, level, [one, torch.zeros(0, 4), two])
    for found, alone in zip(together, (one, torch.zeros(0, 4), two), strict=True):
        assert torch.equal(found, assign(cells, level, [alone])[0])
    assert (together[1] == -1).all()


def test_assignments_are_those_of_torchvision():
    libraries.torchvision()
    from torchvision.models.detection.fcos import FCOS

    kept = {}
    head = SimpleNamespace(compute_loss=lambda targets, outputs, cells, matched: kept.update(m=matched))
    cells, level = grid(SIZES, STRIDES)
    random = np.random.default_rng(0)
    targets = []
    for n in (0, 1, 4, 9):
        low = random.uniform(0, 50, (n, 2))
        boxes = np.concatenate([low, low + random.uniform(3, 60, (n, 2))], 1)
        targets.append(
            {"boxes": torch.from_numpy(boxes).float(), "labels": torch.zeros(n, dtype=torch.int64)}
        )
    own = SimpleNamespace(head=head, center_sampling_radius=1.5)
    FCOS.compute_loss(own, targets, {}, [cells] * 4, [h * w for h, w in SIZES])
    found = assign(cells, level, [t["boxes"] for t in targets])
    assert torch.equal(found, torch.stack(kept["m"])) and (found >= 0).sum() > 30


def test_boxes_go_through_their_distances_and_back():
    libraries.torchvision()
    from torchvision.models.detection._utils import BoxLinearCoder

    cells, _ = grid(SIZES, STRIDES)
    boxes = torch.rand(len(cells), 4) * 30 + torch.tensor([0.0, 0, 31, 31])
    distances = encode(cells, boxes)
    assert torch.allclose(decode(cells, distances), boxes, atol=1e-4)
    coder = BoxLinearCoder(normalize_by_size=True)
    assert torch.allclose(coder.encode(cells, boxes), distances)
    # the point (4, 4) of stride 8: 4 px to the left edge are half a stride
    assert encode(cells[:1], torch.tensor([[0.0, 0, 12, 20]])).tolist() == [[0.5, 0.5, 1, 2]]


def plain_suppression(boxes, labels, limit) -> list[bool]:
    """One by one, as the books have it."""
    kept = []
    for i in range(len(boxes)):
        rivals = [k for k in kept if labels[k] == labels[i]]
        if not any(iou(boxes[k : k + 1], boxes[i : i + 1])[0, 0] > limit for k in rivals):
            kept.append(i)
    return [i not in kept for i in range(len(boxes))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 12), st.sampled_from([0.2, 0.45, 0.7]))
def test_suppression_of_many_images_is_that_of_each_one_by_one(seed, n, limit):
    random = np.random.default_rng(seed)
    low = random.integers(0, 8, (3, n, 2))
    boxes = np.concatenate([low, low + random.integers(0, 8, (3, n, 2))], 2).astype(np.float64)
    labels = random.integers(0, 2, (3, n))
    there = np.ones((3, n), bool)
    found = suppressed(*(torch.from_numpy(a) for a in (boxes, labels, there)), limit)
    for image, box, label in zip(found.tolist(), boxes, labels, strict=True):
        assert image == plain_suppression(box, label, limit)
    again = [b[~f] for b, f in zip(boxes, found.numpy(), strict=True)]
    kinds = [k[~f] for k, f in zip(labels, found.numpy(), strict=True)]
    assert not any(any(plain_suppression(b, k, limit)) for b, k in zip(again, kinds, strict=True))


def test_suppression_by_hand():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [9, 0, 19, 10], [0, 0, 10, 10]]])
    labels, there = torch.tensor([[0, 0, 0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    assert suppressed(boxes, labels, there, 0.5).tolist() == [[False, True, False, False]]
    there[0, 0] = False  # what is not there suppresses nothing
    assert suppressed(boxes, labels, there, 0.5).tolist() == [[False, False, False, False]]


def test_detections_are_sorted_clipped_and_of_their_own_image():
    net = detector().eval()
    points = sum(h * w for h, w in SIZES)
    net.strides = STRIDES
    logits = torch.full((2, points, 2), -20.0)
    logits[0, 9, 1], logits[0, 0, 0], logits[1, 63, 0] = 4.0, 1.0, 2.0  # points (12, 12), (4, 4), (60, 60)
    found = net.detections(
        Outputs(logits, torch.ones(2, points, 4), torch.full((2, points, 1), 3.0), SIZES), (64, 64)
    )
    first, second = found
    assert first.boxes.tolist() == [[4, 4, 20, 20], [0, 0, 12, 12]] and first.labels.tolist() == [1, 0]
    assert second.boxes.tolist() == [[52, 52, 64, 64]]
    expected = (torch.tensor([4.0, 1.0]).sigmoid() * torch.tensor(3.0).sigmoid()).sqrt()
    assert torch.allclose(first.scores, expected)


def test_every_parameter_learns_and_a_batch_without_a_finding_is_no_trouble():
    net = detector()
    x = torch.rand(2, 1, 128, 128)
    none, one = torch.zeros(0, 4), torch.tensor([[10.0, 10, 30, 34]])
    empty, some = torch.zeros(0, dtype=torch.int64), torch.tensor([1])
    sum(net.losses(net(x), [none, none], [empty, empty]).values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    net.zero_grad()
    losses = net.losses(net(x), [none, one], [empty, some])
    sum(losses.values()).backward()
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"}
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_one_image_is_learnt_by_heart():
    net = detector(seed=1)
    x = torch.rand(1, 1, 96, 96) * 0.3
    x[0, 0, 12:26, 20:36] += 0.6
    x[0, 0, 40:60, 8:40] += 0.3
    boxes = torch.tensor([[20.0, 12, 36, 26], [8, 40, 40, 60]])
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(net.losses(net(x), [boxes], [torch.tensor([0, 1])]).values()).backward()
        optimizer.step()
    found = net.train().detections(net(x), (96, 96))[0]  # by the norms of this image
    best = [found.boxes[found.labels == k][0].numpy()[None] for k in (0, 1)]
    assert [found.labels[found.scores > 0.4].tolist()] in ([[0, 1]], [[1, 0]])
    assert all(iou(b, t[None].numpy())[0, 0] > 0.7 for b, t in zip(best, boxes, strict=True))


def test_a_network_without_stages_and_a_width_that_does_not_fit_are_refused():
    with pytest.raises(UserError, match="needs the stages of a ResNet, and DenseNet3d has none"):
        Fcos(build_encoder("densenet3d"), 2)
    with pytest.raises(UserError, match="width 40 does not fit"):
        Fcos(build_encoder("resnet-tiny"), 2, 40)
