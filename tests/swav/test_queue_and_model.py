"""Queue, prototypes and the model's forward."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import normalize

from shards.errors import UserError
from trainer.config import ModelConfig, SwavConfig, TrainConfig, few_samples_warning, load_config
from trainer.optim import build_optimizer
from trainer.step import as_groups, train_step
from trainer.swav.codes import assign_codes
from trainer.swav.model import MultiModalSwav, group_slices
from trainer.swav.queue import FeatureQueue, build_queue
from trainer.swav.sinkhorn import sinkhorn

MODEL = ModelConfig(backbone="resnet-tiny", hidden_dim=16, feature_dim=8)
SWAV = SwavConfig(prototypes=10)


def _features(value: float, b: int = 2) -> torch.Tensor:
    return torch.full((3, 2, b, 4), value)


def test_queue_is_full_by_count_and_drops_the_oldest():
    queue = FeatureQueue(length=6, n_groups=3, n_assigned=2, feature_dim=4)
    for i, full in enumerate((False, False, True, True)):
        queue.enqueue(
            _features(float(i))
        )  # zeros are valid features: the first batch is not mistaken for empty
        assert queue.full is full
    assert sorted(queue.features[1, 1, :, 0].tolist()) == [1, 1, 2, 2, 3, 3]


def test_queue_holds_detached_float32():
    queue = FeatureQueue(length=2, n_groups=3, n_assigned=2, feature_dim=4)
    queue.enqueue(_features(0.5).bfloat16().requires_grad_())
    assert queue.features.dtype == torch.float32
    assert not queue.features.requires_grad


def test_ranks_parts_cover_the_queue_once():
    queue = FeatureQueue(length=10, n_groups=1, n_assigned=1, feature_dim=1)
    queue.features[0, 0, :, 0] = torch.arange(10)
    for world in (1, 2, 3, 4):
        parts = torch.cat([queue.part(rank, world).flatten() for rank in range(world)])
        assert sorted(parts.tolist()) == list(range(10))


def test_queue_continues_after_a_save_and_refuses_another_shape():
    a, b = (FeatureQueue(length=6, n_groups=3, n_assigned=2, feature_dim=4) for _ in range(2))
    for i in range(4):
        a.enqueue(_features(float(i)))
    b.load_state_dict(a.state_dict())
    for queue in (a, b):
        queue.enqueue(_features(9.0))
    assert torch.equal(a.features, b.features)
    assert a.filled == b.filled
    with pytest.raises(UserError, match="same settings"):
        FeatureQueue(8, 3, 2, 4).load_state_dict(a.state_dict())


def test_saved_state_is_a_copy():
    queue = FeatureQueue(length=2, n_groups=3, n_assigned=2, feature_dim=4)
    state = queue.state_dict()
    queue.enqueue(_features(1.0))
    assert state["features"].sum() == 0
    assert int(state["filled"]) == 0


def test_queue_refuses_a_batch_that_does_not_divide_it():
    with pytest.raises(ValueError, match="no multiple of 4"):
        FeatureQueue(length=6, n_groups=3, n_assigned=2, feature_dim=4).enqueue(_features(1.0, b=4))


def test_config_refuses_a_queue_that_is_no_multiple_of_the_batch_and_names_the_nearest():
    with pytest.raises(ValidationError, match="3840 and 3872"):
        TrainConfig.model_validate({"data": {"batch_size": 32}, "swav": {"queue_length": 3850}})


def test_few_samples_for_many_prototypes_are_warned_of():
    assert few_samples_warning(TrainConfig(swav=SwavConfig(queue_length=0))) is not None
    assert few_samples_warning(TrainConfig(swav=SwavConfig(queue_length=3840))) is None
    assert few_samples_warning(load_config("demo")) is None


def test_codes_use_a_full_queue_with_todays_prototypes():
    config = TrainConfig.model_validate(
        {
            "data": {"batch_size": 8, "modalities": ["xr", "ct"]},
            "model": {"backbone": "resnet-tiny", "hidden_dim": 16, "feature_dim": 8},
            "swav": {"prototypes": 10, "queue_length": 16},
        }
    )
    torch.manual_seed(0)
    model, queue = MultiModalSwav(config.model, config.swav, ("xr", "ct")), build_queue(config)
    assert queue is not None
    queue.enqueue(normalize(torch.randn(2, 2, 8, 8), dim=-1))
    z = normalize(torch.randn(2, 2, 4, 8), dim=-1)  # modality, crop, image, feature
    scores = [z[m] @ model.prototypes[name].weight.T for m, name in enumerate(("xr", "ct"))]
    codes = assign_codes(model, scores, queue, config.swav)
    for m, name in enumerate(("xr", "ct")):
        for a in (0, 1):
            rows = torch.cat([z[m, a], queue.features[m, a]])
            expected = sinkhorn(rows @ model.prototypes[name].weight.T, config.swav.epsilon)[:4]
            assert torch.allclose(codes[m][a], expected, atol=1e-6)


def test_prototypes_are_unit_vectors_at_birth_after_a_load_and_in_every_forward():
    model = MultiModalSwav(MODEL, SWAV, ("xr", "us"))
    state = {k: v * 3 if k.startswith("prototypes") else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    for weight in model.prototypes.parameters():
        assert torch.allclose(weight.norm(dim=1), torch.ones(10))
        weight.data.mul_(2)
    model([torch.rand(2, 4, 1, 16, 16)])
    for weight in model.prototypes.parameters():
        assert torch.allclose(weight.norm(dim=1), torch.ones(10))


def test_features_are_unit_and_each_modality_has_its_own_prototypes():
    model = MultiModalSwav(MODEL, SWAV, ("xr", "us"))
    z, scores, _ = model([torch.rand(2, 6, 1, 16, 16), torch.rand(3, 6, 1, 12, 12)])
    assert z.shape == (5, 6, 8)
    assert torch.allclose(z.norm(dim=2), torch.ones(5, 6), atol=1e-5)
    for m, name in enumerate(("xr", "us")):
        expected = z[:, 3 * m : 3 * m + 3] @ model.prototypes[name].weight.T
        assert torch.allclose(scores[m], expected, atol=1e-6)


def test_uint8_crops_are_scaled_and_bfloat16_gives_float32_scores():
    model = MultiModalSwav(MODEL, SWAV, ("xr",)).eval()
    bytes_ = torch.randint(0, 256, (2, 4, 1, 16, 16), dtype=torch.uint8)
    z, _, _ = model([bytes_])
    assert torch.allclose(z, model([bytes_.float() / 255])[0], atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        z, scores, _ = model([bytes_])
    assert z.dtype == scores[0].dtype == torch.float32
    assert torch.allclose(z.norm(dim=2), torch.ones(2, 4), atol=1e-5)


def test_shared_groups_are_one_swav_over_the_whole_batch_as_if_it_had_one_modality():
    crops = [torch.rand(2, 8, 1, 16, 16), torch.rand(3, 8, 1, 12, 12)]
    losses = {}
    for modalities, groups in (
        (("xr", "ct"), "shared"),
        (("xr",), "per-modality"),
        (("xr", "ct"), "per-modality"),
    ):
        config = TrainConfig.model_validate(
            {
                "data": {"batch_size": 8, "modalities": modalities},
                "views": {"crops": [{"count": 2, "size": 16}, {"count": 3, "size": 12}]},
                "model": {"backbone": "resnet-tiny", "hidden_dim": 16, "feature_dim": 8},
                "swav": {
                    "groups": groups,
                    "prototypes": 10,
                    "queue_length": 16,
                    "freeze_prototypes_steps": 1,
                },
            }
        )
        torch.manual_seed(0)
        model, queue = MultiModalSwav(config.model, config.swav, modalities), build_queue(config)
        optimizer = build_optimizer(model, config.optim)
        metrics = [train_step(model, optimizer, queue, crops, step, config) for step in range(5)]
        losses[modalities, groups] = [float(m["loss"]) for m in metrics]
        assert ("m/all/loss" in metrics[0]) is (groups == "shared")
    assert losses[("xr", "ct"), "shared"] == losses[("xr",), "per-modality"]
    assert losses[("xr", "ct"), "shared"] != losses[("xr", "ct"), "per-modality"]


def test_same_size_crops_share_one_backbone_forward_and_all_share_the_heads():
    model = MultiModalSwav(MODEL, SWAV, ("xr",))
    seen: list[tuple[int, ...]] = []
    for module in (model.backbone, model.projection_head):
        module.register_forward_pre_hook(lambda _m, x: seen.append(tuple(x[0].shape)))
    crops = [torch.rand(2, 4, 1, 16, 16), torch.rand(1, 4, 1, 12, 12), torch.rand(3, 4, 1, 16, 16)]
    z, _, _ = model(crops)
    assert seen == [(20, 1, 16, 16), (4, 1, 12, 12), (24, model.backbone.feature_dim)]
    model.eval()
    separate = torch.cat([model([c])[0] for c in crops])
    assert torch.allclose(model(crops)[0], separate, atol=1e-5)
    assert z.shape == separate.shape


def test_crop_layouts_are_equivalent():
    config = load_config("demo")
    flat = [torch.rand(c.count * 8, 1, c.size, c.size) for c in config.views.crops]
    batch = [c.view(k.count, 8, k.size, k.size) for c, k in zip(flat, config.views.crops, strict=True)]
    full = [c.unsqueeze(2) for c in batch]
    for layout in (flat, batch, full):
        for found, expected in zip(as_groups(layout, config), full, strict=True):
            assert torch.equal(found, expected)


def test_slices_refuse_images_that_do_not_fit_the_modalities():
    with pytest.raises(ValueError, match="no multiple"):
        group_slices(7, 2)
    with pytest.raises(ValueError, match="do not share"):
        group_slices(6, 2, (3, 4))


def test_a_step_learns_two_kinds_of_images_apart():
    """Each modality holds bright and striped images: the loss falls below ln K and the classes separate."""
    torch.manual_seed(0)
    config = load_config("demo", ["data.modalities=[xr]", "data.batch_size=16", "swav.prototypes=8"])
    config = config.model_copy(update={"max_steps": 40, "log_every_steps": 39})
    model = MultiModalSwav(config.model, config.swav, ("xr",))
    optimizer = build_optimizer(model, config.optim)
    stripes = (torch.arange(40) % 4 < 2).float().expand(40, 40)
    metrics: dict[str, object] = {}
    for step in range(40):
        crops = []
        for group in config.views.crops:
            images = torch.rand(group.count, 16, group.size, group.size) * 0.3
            images[:, ::2] += stripes[: group.size, : group.size] * 0.7
            crops.append(images)
        metrics = train_step(model, optimizer, None, crops, step, config)
    assert float(metrics["m/xr/loss_minus_ln_k"]) < -0.5
    assert 0 < float(metrics["m/xr/effective_prototypes"]) <= 8
