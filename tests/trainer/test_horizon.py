"""Samples and virtual epochs are stored in steps; a learning rate is scaled only where that is asked for."""

from dataclasses import replace

import pytest

from shards.errors import UserError
from tests.trainer.fake import FINGERPRINT, FakeBatches, tiny
from trainer.config import TrainConfig, load_config
from trainer.loop import train
from trainer.optim import learning_rate

IN_EPOCHS = {
    "max_samples": 103,
    "epoch_samples": 20,
    "data": {"batch_size": 8},
    "swav": {"queue_length": 8, "queue_start_epoch": 1.5, "freeze_prototypes_epochs": 2},
}


def test_samples_become_whole_batches_and_an_epoch_the_step_it_begins_with():
    config = TrainConfig.model_validate(IN_EPOCHS)
    swav = config.swav
    # Image 30 begins epoch 1.5, and step 4 of batches of 8 is the first that begins at or after it.
    assert (config.max_steps, swav.queue_start_step, swav.freeze_prototypes_steps) == (12, 4, 5)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_steps": 13}, r"max_steps=13 and max_samples=103 \(which is 12 steps\) .* exactly one"),
        ({"max_samples": 7}, "max_samples=7 is less than one batch of 8"),
        ({"epoch_samples": None}, r"queue_start_epoch=1\.5 needs epoch_samples"),
        (
            {"swav": {**IN_EPOCHS["swav"], "freeze_prototypes_steps": 9}},
            r"swav\.freeze_prototypes_steps=9 and swav\.freeze_prototypes_epochs=2 \(which is 5 steps\)",
        ),
    ],
)
def test_two_ways_to_say_one_thing_must_not_disagree(change, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig.model_validate(IN_EPOCHS | change)


def test_an_override_in_steps_takes_the_place_of_the_preset_s_epochs_and_samples(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "max_samples: 103\nepoch_samples: 20\ndata: {batch_size: 8}\n"
        "swav: {queue_length: 8, queue_start_epoch: 1.5, freeze_prototypes_epochs: 2}\n"
    )
    assert load_config(str(preset)).max_steps == 12
    config = load_config(str(preset), ["max_steps=50", "swav.queue_start_step=0"])
    assert (config.max_steps, config.max_samples) == (50, None)
    assert (config.swav.queue_start_step, config.swav.freeze_prototypes_steps) == (0, 5)
    assert load_config(str(preset), ["data.batch_size=16", "swav.queue_length=16"]).max_steps == 6
    with pytest.raises(UserError, match="exactly one"):
        load_config(str(preset), ["max_steps=50", "max_samples=103"])


def test_linear_scaling_multiplies_the_whole_schedule_and_is_off_by_default():
    plain = tiny(max_steps=100, data__batch_size=512, swav__queue_length=0, optim__final_learning_rate=0.0002)
    scaled = tiny(
        max_steps=100,
        data__batch_size=512,
        swav__queue_length=0,
        optim__final_learning_rate=0.0002,
        optim__lr_scaling="linear",
    )
    assert learning_rate(0, plain) == 0.002
    for step in (0, 50, 99, 100):
        assert learning_rate(step, scaled) == pytest.approx(2 * learning_rate(step, plain), rel=1e-12)


def test_the_loop_trains_on_batches_of_unequal_parts(tmp_path):
    config = tiny(max_steps=3, log_every_steps=1, data__sampling="proportional", swav__queue_length=0)
    batches, seen = FakeBatches(config), []
    result = train(
        config,
        lambda step: replace(batches(step), sizes=(6, 2) if step else (8, 0)),
        tmp_path,
        dataset_fingerprint=FINGERPRINT,
        on_metrics=seen.append,
    )
    assert result.finished and all(0 < loss < 10 for loss in result.losses)
    assert seen[0]["m/xr/loss"] == 0 < seen[1]["m/xr/loss"]
