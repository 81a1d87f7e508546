"""The hybrid loss (method.md eq. 4) against plain numpy, over ranks, and through a resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.errors import UserError
from tests.dist import run_ranks
from tests.trainer.fake import FINGERPRINT, FakeBatches, fake_sets, tiny
from trainer import checkpoint, journal
from trainer.build import build_model, restored
from trainer.config import SupervisionConfig, TrainConfig
from trainer.export import load_encoder
from trainer.export_heads import load_heads
from trainer.labels import LabelSet
from trainer.loop import train
from trainer.optim import build_optimizer
from trainer.step import train_step
from trainer.supervised import label_losses, label_weights

SETS = [{"name": "finding", "beta": 0.5}, {"name": "signs", "kind": "multi", "beta": 2.0}]


def hybrid(sets: list[dict[str, Any]] = SETS, **changes: Any) -> TrainConfig:
    supervision = {name: changes.pop(name) for name in ("alpha", "denominator") if name in changes}
    return tiny(supervision={"labels": sets, **supervision}, **changes)


def plain_formula(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """L_sup of each image, one number after the other."""
    views, n, classes = logits.shape
    found = np.zeros(n)
    for k in range(n):
        for row in logits[:, k]:
            if labels.ndim == 1 and labels[k] >= 0:
                found[k] -= np.log(np.exp(row[labels[k]]) / np.exp(row).sum()) / views
            elif labels.ndim == 2:
                known = [c for c in range(classes) if labels[k, c] >= 0]
                for c in known:
                    p = 1 / (1 + np.exp(-row[c]))
                    found[k] -= np.log(p if labels[k, c] == 1 else 1 - p) / len(known) / views
    return found


@pytest.mark.parametrize("denominator", ["batch", "labelled"])
def test_the_supervised_part_is_equation_4(denominator):
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 6, 3))
    labels = {
        "finding": np.array([0, 2, -1, 1, -1, 2]),
        "signs": np.array([[1, 0, 1], [-1, 1, 0], [-1, -1, -1], [0, 0, 0], [-1, -1, 1], [-1, -1, -1]]),
    }
    there = {name: torch.from_numpy(values) for name, values in labels.items()}
    weights, counts = label_weights(
        there, 6, SupervisionConfig.model_validate({"labels": SETS, "denominator": denominator})
    )
    for name, values in labels.items():
        found = label_losses(torch.from_numpy(logits), there[name])
        expected = plain_formula(logits, values)
        assert np.abs(found.numpy() - expected).max() <= 1e-6
        total = float(found.sum() * weights[name])
        assert total == pytest.approx(expected.sum() / (6 if denominator == "batch" else 4), abs=1e-6)
        assert int(counts[name]) == 4


def _step(
    rank: int, world: int, denominator: str, unlabelled: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and metrics of one step, without batch norm. unlabelled: images without any label."""
    config = hybrid(denominator=denominator, log_every_steps=1, data__batch_size=12, swav__queue_length=0)
    torch.manual_seed(0)
    core = build_model(config, fake_sets(config))
    core.backbone = Small()
    core.projection_head = nn.Linear(16, 8)
    core.label_heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in core.label_heads})
    model = DistributedDataParallel(core, find_unused_parameters=True) if world > 1 else core
    batch = FakeBatches(config, rank, world)(0)
    crops = [torch.from_numpy(c).float() / 255 for c in batch.crops]
    labels = {name: torch.from_numpy(values) for name, values in batch.labels.items()}
    for values in labels.values():
        for place, key in enumerate(batch.keys):  # rank 1 holds draws 3 to 5 of both modalities
            if unlabelled == "all" or (unlabelled == "of rank 1" and int(key[2:]) >= 3):
                values[place] = -1
    metrics = train_step(model, build_optimizer(model, config.optim), None, crops, 0, config, labels=labels)
    gradients = {name: p.grad for name, p in core.named_parameters() if p.grad is not None}
    return gradients, {name: float(value) for name, value in metrics.items() if not name.endswith("/use")}


class Small(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)).tanh()


@pytest.mark.parametrize(
    ("denominator", "unlabelled"),
    [("batch", "none"), ("labelled", "of rank 1"), ("labelled", "all")],
)
def test_ranks_equal_one_process_also_where_one_or_all_have_no_label(denominator, unlabelled):
    gradients, metrics = _step(0, 1, denominator, unlabelled)
    assert {"label_heads.finding.weight", "label_heads.signs.bias", "backbone.weight"} <= gradients.keys()
    assert (metrics["labelled/finding"] > 0) is (unlabelled != "all")
    assert (float(gradients["label_heads.finding.bias"].abs().sum()) > 0) is (unlabelled != "all")
    parts = 0.5 * metrics["loss_supervised/finding"] + 2 * metrics["loss_supervised/signs"]
    assert metrics["loss"] == pytest.approx(metrics["loss_self"] + parts, abs=1e-6)
    for of_rank, told in run_ranks(_step, 2, denominator, unlabelled):
        for name, value in gradients.items():
            assert (of_rank[name] - value).abs().max() <= 1e-6, name
        assert told.keys() == metrics.keys()
        for name, value in metrics.items():
            assert told[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def run(
    run_dir: Path,
    config: TrainConfig,
    stop_at: int = 1000,
    sets: tuple[LabelSet, ...] | None = None,
    **options: Any,
) -> list[float]:
    asked = iter(range(1, 1000))
    sets = fake_sets(config) if sets is None else sets
    train(
        config,
        FakeBatches(config),
        run_dir,
        dataset_fingerprint=FINGERPRINT,
        labels=sets,
        should_stop=lambda: next(asked) >= stop_at,
        **options,
    )
    return [row["loss"] for row in journal.read(journal.journal_path(run_dir))]


def test_weights_of_zero_are_plain_swav_exactly(tmp_path):
    silent = hybrid([{**one, "beta": 0.0} for one in SETS], log_every_steps=1)
    assert run(tmp_path / "silent", silent) == run(tmp_path / "plain", tiny(log_every_steps=1))


def test_a_hybrid_run_goes_on_exactly_and_gives_its_heads(tmp_path):
    config, seen = hybrid([SETS[0], {**SETS[1], "reads": "both"}]), []
    straight = run(tmp_path / "straight", config, on_metrics=seen.append)
    run(tmp_path / "stopped", config, stop_at=5)
    changed = tuple(LabelSet(s.name, s.kind, s.classes, f"not {s.digest}") for s in fake_sets(config))
    with pytest.raises(UserError, match="labels 'finding' are not those that the run began with"):
        run(tmp_path / "stopped", config, sets=changed)
    assert run(tmp_path / "stopped", config) == straight
    for metrics in seen:
        supervised = 0.5 * metrics["loss_supervised/finding"] + 2 * metrics["loss_supervised/signs"]
        assert metrics["loss"] == pytest.approx(metrics["loss_self"] + supervised)
    assert seen[-1]["loss_supervised/signs"] < seen[0]["loss_supervised/signs"]
    encoder, _ = load_encoder(tmp_path / "straight" / "encoder.safetensors")
    heads = load_heads(tmp_path / "straight" / "heads.safetensors")
    assert [(name, head.kind, head.classes) for name, head in heads.items()] == [
        ("finding", "classes", ("a", "b", "c")),
        ("signs", "multi", ("a", "b", "c")),
    ]
    images = torch.rand(2, 1, 16, 16)
    assert heads["finding"].logits(encoder(images)).shape == (2, 3)
    # The exported head and encoder give what the network of the checkpoint gives.
    saved = checkpoint.newest(tmp_path / "straight")
    _, core = restored(saved.state, saved.part("model"))
    core.eval()
    of_run = core([images.unsqueeze(0)] * len(config.views.crops), None).logits["signs"][0]
    assert torch.allclose(heads["signs"].logits(encoder(images)), of_run, atol=1e-6)
    assert heads["signs"].linear.in_features == encoder.feature_dim + config.model.feature_dim


@pytest.mark.parametrize("reads", ["pooled", "projected", "both"])
def test_a_head_learns_from_what_it_reads(reads):
    config = hybrid([{**SETS[0], "reads": reads}])
    torch.manual_seed(0)
    core = build_model(config, fake_sets(config)[:1])
    out = core([torch.rand(2, 4, 1, 16, 16)] * len(config.views.crops))
    out.logits["finding"].square().sum().backward()
    reached = core.projection_head[3].weight.grad is not None
    assert reached is (reads != "pooled") and core.label_heads["finding"].weight.grad is not None
    assert next(core.backbone.parameters()).grad is not None


def test_settings_without_labels_or_for_strangers_are_refused():
    with pytest.raises(ValueError, match="alpha and denominator go with labels"):
        tiny(supervision={"alpha": 0.5})
    with pytest.raises(ValueError, match="each table once"):
        hybrid([SETS[0], SETS[0]])
    with pytest.raises(ValueError, match=r"finding is for mr, which data\.modalities does not name"):
        hybrid([{**SETS[0], "modalities": ["mr"]}])
