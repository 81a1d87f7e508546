"""The demo preset is fitted to the data that is there, and says so; what the user sets is obeyed."""

import pytest

from orchestration.demo_config import ENOUGH_IMAGES, fit
from shards.errors import UserError
from trainer.config import load_config


def split(train: int, val: int = 0, test: int = 0) -> dict[str, int]:
    return {"train": train, "val": val, "test": test}


def test_a_full_dataset_gets_the_preset_as_it_is_and_nothing_to_say() -> None:
    fitted = fit("/d", {m: split(2000, 200, 200) for m in ("us", "mr", "ct", "xr")})
    preset = load_config("demo")
    assert fitted.notes == ()
    assert fitted.config.max_steps == preset.max_steps
    assert fitted.config.data.modalities == preset.data.modalities
    assert fitted.config.data.batch_size == preset.data.batch_size


@pytest.mark.parametrize("name", ["/study #2", "/a: b", "/[x", "/d\u00e9\U0001f600", '/q"'])
def test_a_folder_s_name_is_never_read_as_yaml(name: str) -> None:
    assert fit(name, {"ct": split(400)}).config.data.dataset == name


def test_a_small_dataset_gets_fewer_steps_and_a_smaller_batch_and_says_both() -> None:
    fitted = fit("/d", {"ct": split(26, 13, 3)})
    assert fitted.config.data.modalities == ("ct",)
    assert fitted.config.data.batch_size == 26
    assert fitted.config.max_steps < load_config("demo").max_steps
    assert any("Batch of 26" in note for note in fitted.notes)
    assert any(f"{fitted.config.max_steps} steps" in note for note in fitted.notes)
    assert fitted.config.swav.freeze_prototypes_steps < fitted.config.max_steps


def test_few_patients_train_on_all_splits_and_it_is_said() -> None:
    fitted = fit("/d", {"ct": split(0, 0, 40)})
    assert fitted.config.data.split == "all"
    assert any("all splits" in note for note in fitted.notes)


def test_a_modality_with_hardly_an_image_is_left_out_by_name() -> None:
    fitted = fit("/d", {"ct": split(400, 50, 50), "us": split(3)})
    assert fitted.config.data.modalities == ("ct",)
    assert any("us (3)" in note for note in fitted.notes)


def test_even_three_images_are_trained_on_when_nothing_else_is_there() -> None:
    fitted = fit("/d", {"us": split(3)})
    assert fitted.config.data.modalities == ("us",)
    assert fitted.config.data.batch_size == ENOUGH_IMAGES


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_batch_can_be_shared_by_the_ranks(ranks: int) -> None:
    from trainer.config import check_world

    fitted = fit("/d", {"ct": split(27), "mr": split(400), "oct": split(90)}, ranks=ranks)
    check_world(fitted.config, ranks)
    assert fitted.config.data.modalities == ("ct", "mr", "oct")


def test_what_the_user_sets_is_obeyed_and_said() -> None:
    fitted = fit("/d", {"ct": split(26)}, ["max_steps=7", "data.batch_size=4", "model.hidden_dim=32"])
    assert (fitted.config.max_steps, fitted.config.data.batch_size) == (7, 4)
    assert fitted.config.model.hidden_dim == 32
    assert any("max_steps=7" in note for note in fitted.notes)


def test_no_image_at_all_is_a_user_error_that_says_where_the_reasons_are() -> None:
    with pytest.raises(UserError, match="ingest status"):
        fit("/d", {"ct": split(0)})
