"""The loop of the tasks: the best epoch on val, an end in time, the same numbers after a kill, few labels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from torch import nn

from shards.errors import UserError
from trainer import files
from trainer.downstream.finetune import (
    BEST,
    METRICS,
    RESULT,
    STATE,
    FinetuneConfig,
    evaluate,
    finetune,
    load_best,
    metric_curve,
    sweep,
)
from trainer.downstream.task import Dataset, Sample, Task
from trainer.evaluate import roc

WIDTH = 6


def dataset(prefix: str, n: int, seed: int) -> Dataset:
    """Two samples a patient; the class shows in the first feature. Training adds noise from the stream."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) // 2 % 2
    x = random.standard_normal((n, WIDTH)).astype(np.float32)
    x[:, 0] += 1.5 * labels

    def sample(i, stream):
        noise = 0 if stream is None else 0.1 * stream.standard_normal(WIDTH)
        return Sample((x[i] + noise).astype(np.float32), int(labels[i]))

    return Dataset(np.array([f"{prefix}{i // 2}" for i in range(n)]), sample)


class Net(nn.Module):
    """With a dropout, whose numbers a resume must draw again, and a part that is not trained."""

    def __init__(self):
        super().__init__()
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.rest = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 1))
        with torch.no_grad():
            self.fixed.weight.copy_(torch.eye(WIDTH))

    def forward(self, x):
        return self.rest(self.fixed(x))[:, 0]


def task(**changes) -> Task:
    def loss(network, inputs, targets):
        return nn.functional.binary_cross_entropy_with_logits(network(inputs), torch.tensor(targets).float())

    def metrics(predictions, targets):
        return {"auc": roc.auc(targets, predictions), "sensitivity": roc.sensitivity(targets, predictions, 2)}

    made = Task(
        name="blobs",
        train=dataset("t", 48, 0),
        val=dataset("v", 24, 1),
        test=dataset("e", 24, 2),
        network=Net,
        loss=loss,
        predict=lambda network, inputs: network(inputs).sigmoid().tolist(),
        metrics=metrics,
        selection="auc",
        strata={f"t{i}": i % 2 for i in range(24)},
    )
    return replace(made, **changes)


SHORT = FinetuneConfig(epochs=2, batch_size=16, learning_rate=0.03)
CONFIG = FinetuneConfig(epochs=4, batch_size=16, learning_rate=0.03)


def scripted(values, calls):
    """Metrics that follow a script on val, and note every split that was judged by its size."""

    def metrics(predictions, targets):
        calls.append(len(targets))
        return {"auc": values[calls.count(24) - 1] if len(targets) == 24 else 0.0}

    return metrics


def test_it_learns_and_its_best_epoch_comes_back_from_the_file(tmp_path):
    result = finetune(task(), CONFIG, tmp_path / "run")
    curve = metric_curve(tmp_path / "run", "auc")
    assert len(curve) == result.epochs == 4 and result.best_epoch == int(np.argmax(curve)) + 1
    assert result.val["auc"] == max(curve) > 0.8 and result.test["auc"] > 0.8
    assert result.n_train == 48 and result.n_patients == 24
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([BEST, METRICS, RESULT])
    net = Net()
    load_best(net, tmp_path / "run")
    assert evaluate(task(), net, task().test, 16) == result.test
    with safetensors.safe_open(tmp_path / "run" / BEST, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("fixed")]  # noqa: SIM118


def test_it_ends_when_val_has_not_become_better_and_looks_at_test_once(tmp_path):
    calls = []
    values = [0.5, 0.7, 0.6, 0.7, 0.65, 0.9]  # a draw is not better: 2 stays the best, 5 is the end
    one = task(metrics=scripted(values, calls), test=dataset("e", 10, 2))
    result = finetune(one, CONFIG.model_copy(update={"epochs": 6, "patience": 3}), tmp_path)
    assert (result.best_epoch, result.epochs, result.val["auc"]) == (2, 5, 0.7)
    assert calls == [24] * 5 + [10]
    calls.clear()
    again = CONFIG.model_copy(update={"epochs": 6, "patience": 0, "evaluate_test": True})
    assert finetune(one, again, tmp_path / "whole").best_epoch == 6
    assert calls == [24, 10] * 6 + [10] and metric_curve(tmp_path / "whole", "auc", "test") == [0.0] * 6


def test_a_training_killed_at_any_write_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    straight = finetune(task(), SHORT, tmp_path / "straight")
    operations = []
    monkeypatch.setattr(files, "before", lambda what, path: operations.append(what))
    finetune(task(), SHORT, tmp_path / "counted")
    assert len(operations) > 12
    for nth in range(0, len(operations), 5):
        folder, left = tmp_path / f"killed{nth}", [nth]

        def die(what, path, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "before", die)
        with pytest.raises(KeyboardInterrupt):
            finetune(task(), SHORT, folder)
        monkeypatch.setattr(files, "before", lambda what, path: None)
        assert finetune(task(), SHORT, folder) == straight
        for name in (METRICS, BEST, RESULT):
            assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
        assert not (folder / STATE).exists()


def test_a_resume_repeats_no_epoch(tmp_path):
    seen = []

    def stop(line):
        seen.append(line["epoch"])
        if line["epoch"] == 2 and len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(task(), CONFIG, tmp_path, progress=stop)
    finetune(task(), CONFIG, tmp_path, progress=stop)
    finetune(task(), CONFIG, tmp_path, progress=stop)  # done: nothing to do
    assert seen == [1, 2, 3, 4]


def test_numbers_follow_the_seed_and_the_generators_of_the_caller_stay(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (finetune(task(), CONFIG, tmp_path / name) for name in "ab")
    assert torch.equal(torch.get_rng_state(), before)
    other = finetune(task(), CONFIG.model_copy(update={"seed": 1}), tmp_path / "c")
    losses = [
        [json.loads(t)["loss"] for t in (tmp_path / n / METRICS).read_text().splitlines()] for n in "abc"
    ]
    assert first == again and losses[0] == losses[1] and losses[0] != losses[2] and other != first


def test_label_fractions_are_nested_patients_and_a_sweep_goes_on_where_it_was(tmp_path):
    used: dict[int, set[int]] = {}

    def noted(of):
        def sample(i, stream):
            if stream is not None:
                used.setdefault(current[0], set()).add(i)
            return of.sample(i, stream)

        return Dataset(of.patients, sample)

    current = [0]
    config = CONFIG.model_copy(update={"epochs": 1})
    found = sweep(lambda s: task(), config, tmp_path, fractions=(1.0, 0.5, 0.25), seeds=(0, 1))
    assert [[r.n_train for r in found[f]] for f in (1.0, 0.5, 0.25)] == [[48, 48], [24, 24], [12, 12]]
    again = sweep(lambda s: task(network=None), config, tmp_path, fractions=(1.0, 0.5, 0.25), seeds=(0, 1))
    assert again == found
    for k, fraction in enumerate((0.5, 0.25)):
        current[0] = k
        one = config.model_copy(update={"fraction": fraction})
        finetune(task(train=noted(task().train)), one, tmp_path / f"noted{k}")
    assert used[1] < used[0]
    assert all(i ^ 1 in used[1] for i in used[1])  # both samples of a patient
    assert sum(i // 2 % 2 for i in used[1]) == 6  # half of each class


def test_folders_and_tasks_that_do_not_fit_are_refused_in_one_line(tmp_path):
    finetune(task(), CONFIG, tmp_path)
    with pytest.raises(
        UserError, match=r"holds a training with learning_rate=0\.03, not 0\.01: give another"
    ):
        finetune(task(), CONFIG.model_copy(update={"learning_rate": 0.01}), tmp_path)
    with pytest.raises(UserError, match="holds a training with identity=, not b"):
        finetune(task(identity="b"), CONFIG, tmp_path)
    with pytest.raises(UserError, match=r"holds another network: .* names differ"):
        load_best(nn.Linear(WIDTH, 1), tmp_path)
    (tmp_path / BEST).write_bytes(b"x")
    with pytest.raises(UserError, match=r"best.safetensors is damaged or gone"):
        load_best(Net(), tmp_path)
    new = tmp_path / "new"
    with pytest.raises(UserError, match=r"1 patients are in two splits|12 patients are in two splits"):
        finetune(task(test=task().val), CONFIG, new)
    with pytest.raises(UserError, match="the val split has no samples"):
        finetune(task(val=dataset("v", 0, 1)), CONFIG, new)
    with pytest.raises(UserError, match="val gives no auc, which chooses the best epoch"):
        finetune(task(val=dataset("v", 2, 1)), CONFIG, new)
    with pytest.raises(UserError, match="the loss of epoch 1 is nan: lower learning_rate"):
        finetune(task(loss=lambda n, x, t: n(x).sum() * torch.nan), CONFIG, new)
    assert not (new / STATE).exists() and not (new / BEST).exists()
    assert json.loads((tmp_path / METRICS).read_text().splitlines()[0])["val"]["sensitivity"] == 0
