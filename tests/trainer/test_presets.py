"""Presets: the numbers of Table I are held one by one, and every preset makes a step."""

import json

import pytest
import torch

from orchestration.cli import main
from shards.errors import UserError
from trainer.build import build_model
from trainer.config import TrainConfig, load_config
from trainer.optim import build_optimizer
from trainer.preset_files import preset_about, preset_description, preset_names, preset_settings
from trainer.step import train_step
from trainer.swav.model import MultiModalSwav
from trainer.swav.queue import build_queue

D_X, D_M = 1_297_699, 105_006_320


@pytest.mark.parametrize(("name", "images"), [("paper_2d_xray", D_X), ("paper_2d_mixed", D_M)])
def test_the_paper_s_presets_hold_every_number_of_table_one(name, images):
    config, written = load_config(name), preset_settings(name)
    views, swav, optim = config.views, config.swav, config.optim
    assert [(c.count, c.size) for c in views.crops] == [(2, 224), (6, 92)]
    assert (views.geometry, views.default_size_range, views.size_range) == ("paper", (600, 1200), {})
    assert views.border == (0.1, 0.1)
    assert (swav.groups, swav.assign) == ("per-modality", (0, 1))
    assert (swav.temperature, swav.epsilon, swav.sinkhorn_iterations) == (0.1, 0.03, 3)
    assert (config.model.feature_dim, swav.prototypes, swav.queue_length) == (128, 3000, 3840)
    assert (swav.queue_start_epoch, swav.freeze_prototypes_steps) == (10, 10_000)
    assert (config.max_samples, config.epoch_samples, config.data.batch_size) == (
        100 * images,
        images,
        8 * 32,
    )
    assert config.max_steps == 100 * images // 256
    assert (optim.learning_rate, optim.final_learning_rate, optim.weight_decay) == (0.6, 0.0006, 1e-6)
    assert (optim.optimizer, optim.warmup_steps, optim.lr_scaling) == ("larc-sgd", 0, "none")
    # Also needed, by the text under the table.
    assert (optim.momentum, optim.larc_trust, optim.larc_eps) == (0.9, 0.001, 1e-8)
    assert (config.model.backbone, config.model.hidden_dim) == ("resnet50", 2048)
    # The augmentations: printed ranges, and our reading of the probabilities.
    assert (views.sigmas, views.gamma) == ((1, 2, 4, 8, 16), (1.8, 2.6))
    assert (views.linear_gain, views.linear_offset) == ((0.9, 1.1), (-0.2, 0.2))
    assert (views.energy_probability, views.gamma_probability, views.linear_probability) == (0.8, 0.5, 0.5)
    assert config.data.sampling == "equal" and set(preset_about(name).images) == set(config.data.modalities)
    assert sum(preset_about(name).images.values()) == images
    # They are written in the file, also where they are defaults today.
    for section in ("views", "swav", "optim"):
        assert len(written[section]) >= 8


def test_the_paper_s_preset_of_volumes_holds_the_numbers_of_the_3d_column():
    config, written = load_config("paper_3d_ct"), preset_settings("paper_3d_ct")
    views, swav, optim = config.views, config.swav, config.optim
    assert [(c.count, c.size) for c in views.crops] == [(1, (224, 192)), (4, (112, 96))]
    assert views.volume.box == (40, 224, 192) and views.volume.size_range == ((112, 96), (250, 200))
    assert (views.geometry, views.border) == ("paper", (0.1, 0.1))
    assert (swav.assign, swav.temperature, swav.epsilon, swav.sinkhorn_iterations) == ((0, 1), 0.1, 0.03, 3)
    assert (config.model.feature_dim, swav.prototypes, swav.queue_length) == (128, 1500, 1920)
    assert (swav.queue_start_epoch, swav.freeze_prototypes_steps) == (3, 4000)
    assert (config.max_samples, config.epoch_samples) == (100 * 24_440, 24_440)
    assert config.data.batch_size == 8 * 4 and config.model.backbone == "densenet3d"
    assert (optim.optimizer, optim.momentum, optim.weight_decay) == ("larc-sgd", 0.9, 1e-6)
    assert (optim.learning_rate, optim.final_learning_rate) == (0.6, 0.0006)
    window = config.data.intensity_of("ct_volumes")
    assert (window.mode, window.center, window.width) == ("fixed", 55, 200)
    assert (views.energy_probability, views.gamma, views.linear_gain) == (0.8, (1.8, 2.6), (0.9, 1.1))
    assert all(len(written[section]) >= 8 for section in ("views", "swav", "optim"))


@pytest.mark.parametrize("name", ["recommended_2d_xray", "recommended_2d_mixed"])
def test_the_recommended_presets_differ_from_the_paper_s_in_what_they_say(name):
    paper = load_config(name.replace("recommended", "paper")).model_dump()
    recommended = load_config(name)
    crops = recommended.views.crops
    assert recommended.views.geometry == "recommended" and recommended.views.border == (0, 0)
    assert [(c.count, c.size, c.share) for c in crops] == [(2, 224, (0.14, 1)), (6, 92, (0.05, 0.14))]
    ours = recommended.model_dump()
    for section in ("data", "model", "optim", "checkpoint"):
        assert ours[section] == paper[section]
    for section, differ in (("views", {"geometry", "border", "crops"}), ("swav", {"queue_start_step"})):
        assert {k for k, v in ours[section].items() if v != paper[section][k]} <= differ


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_its_network_and_makes_a_step(name):
    modalities = len(load_config(name).data.modalities)
    queue = 2 * modalities if load_config(name).swav.queue_length else 0
    small = [
        f"data.batch_size={2 * modalities}",
        f"swav.queue_length={queue}",
        "swav.prototypes=6",
        "views.crops=[{count: 2, size: 32}, {count: 2, size: 16}]",
    ]
    volumes = load_config(name).views.volume is not None
    small.append("views.volume.box=[8,32,32]" if volumes else "model.backbone=resnet-tiny")
    with torch.device("meta"):
        whole = build_model(load_config(name))
    assert isinstance(whole, MultiModalSwav) and len(whole.groups) == modalities
    config = load_config(name, small)
    torch.manual_seed(0)
    model = build_model(config)
    crops = [torch.rand(c, n, 1, *shape) for c, n, *shape in config.views.stack_shapes(2 * modalities)]
    metrics = train_step(model, build_optimizer(model, config.optim), build_queue(config), crops, 0, config)
    assert 0 < float(metrics["loss"]) < 10


def test_every_preset_says_how_to_run_it_and_what_is_known_of_it():
    for name in preset_names():
        text = preset_description(name)
        assert f"-m trainer --preset {name} " in text and "ray job submit --address" in text
        assert f"-- medswav pretrain --preset {name} " in text
        assert ("ardware" in text and "Time: " in text) or "time are not yet measured" in text
        assert "Expected figure" in text


def test_the_command_lists_and_shows_presets(capsys, tmp_path):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == preset_names()
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in preset_names())
    assert main(["presets", "show", "paper_2d_xray", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert TrainConfig.model_validate(shown["settings"]) == load_config("paper_2d_xray")
    assert shown["about"]["images"] == {"xr": D_X}
    assert main(["presets", "show", "demo"]) == 0
    told = capsys.readouterr().out
    assert "medswav pretrain --preset demo" in told and "backbone: resnet-tiny" in told and "#" not in told
    assert main(["presets", "show", "paper-2d"]) == 2
    assert "choose from demo" in capsys.readouterr().err


def test_what_a_preset_says_about_its_data_is_held_to_its_form(tmp_path):
    (tmp_path / "mine.yaml").write_text("about: {images: {ct: many}}\nmax_steps: 5\n")
    assert load_config(str(tmp_path / "mine.yaml")).max_steps == 5
    with pytest.raises(UserError, match="about of"):
        preset_about(str(tmp_path / "mine.yaml"))
