"""Prototypes of images: the right one of the right modality, and the nearest images of each."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from orchestration.assign_page import write_page
from shards.errors import UserError
from tests.encoders.conftest import config, trained
from trainer import checkpoint
from trainer.assign import assign, nearest_prototypes, open_projector
from trainer.batches import eval_images
from trainer.build import build_model
from trainer.config import TrainConfig
from trainer.embed import open_parts
from trainer.source import open_source


def assigned(dataset, run, out, **options):
    source = open_source(run)
    parts = open_parts(dataset, source.info.intensity, source.info.modalities)
    found = assign(dataset, source, out, parts, batch_size=4, device="cpu", **options)
    return source, parts, found, pq.read_table(out).to_pylist()


def expected(dataset, run, group) -> dict[str, tuple[int, float]]:
    """Prototype and distance of every image by the model of the run itself."""
    found = checkpoint.newest(run)
    settings = TrainConfig.model_validate(found.state["config"])
    model = build_model(settings)
    model.load_state_dict(found.part("model"))
    model.eval()
    answer = {}
    for modality in settings.data.modalities:
        size = settings.views.whole_image_size
        keys, images, _ = eval_images(dataset, modality, size, settings.data.intensity)
        with torch.inference_mode():
            (z,), _ = model.embed([torch.from_numpy(images)[None]])
            scores = (z @ model.prototypes[group or modality].weight.T).numpy()
        answer |= {k: (int(s.argmax()), 1 - float(s.max())) for k, s in zip(keys, scores, strict=True)}
    return answer


def test_the_nearest_is_that_of_the_largest_cosine_and_the_first_of_equals():
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    index, distance = nearest_prototypes(z, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    assert index.tolist() == [1, 0, 1] and np.allclose(distance, [0, 0.2, 1.0])


@pytest.mark.parametrize("groups", ["per-modality", "shared"])
def test_every_image_gets_the_nearest_prototype_of_its_own_group(dataset, run, tmp_path, groups):
    if groups == "shared":
        run = trained(config(dataset, swav__groups="shared"), tmp_path / "run")
    _, _, found, rows = assigned(dataset, run, tmp_path / "a.parquet", nearest=3)
    wanted = expected(dataset, run, "all" if groups == "shared" else None)
    assert len(rows) == len(wanted) == 33
    for row in rows:
        prototype, distance = wanted[row["key"]]
        assert row["prototype"] == prototype and row["distance"] == pytest.approx(distance, abs=1e-5)
    for modality in found:
        own = [row for row in rows if row["modality"] == modality.modality]
        assert modality.counts.tolist() == np.bincount([r["prototype"] for r in own], minlength=8).tolist()
        for number, (distances, indices) in modality.nearest.items():
            best = sorted((r["distance"], i) for i, r in enumerate(own) if r["prototype"] == number)[:3]
            assert list(zip(distances.tolist(), indices.tolist(), strict=True)) == best


def test_the_sheet_is_one_private_file_with_a_warning(dataset, run, tmp_path):
    source, parts, found, _ = assigned(dataset, run, tmp_path / "a.parquet", nearest=2)
    page = tmp_path / "page.html"
    write_page(page, dataset, source.info, parts, found, limit=1)
    text = page.read_text()
    assert page.stat().st_mode & 0o777 == 0o600
    assert "as sensitive as the dataset" in text and not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("<figure>") == sum(min(2, int(a.counts.max())) for a in found)
    for a in found:
        assert f"<h3>Prototype {int(a.counts.argmax())} <small>{int(a.counts.max())} image" in text


def test_without_prototypes_nothing_is_assigned(dataset, run, tmp_path):
    with pytest.raises(UserError, match="prototypes are in the checkpoints of a run"):
        open_projector(
            open_source(trained(config(dataset, max_steps=1), tmp_path / "r") / "encoder.safetensors")
        )
    crops = [{"count": 2, "size": 16}]
    settings = config(dataset, max_steps=1).model_dump(mode="json", exclude_defaults=True)
    del settings["swav"]
    settings["views"]["crops"] = crops
    simclr = TrainConfig.model_validate(settings | {"method": "simclr"})
    with pytest.raises(UserError, match=r"no prototypes .another method trained it"):
        open_projector(open_source(trained(simclr, tmp_path / "simclr")))
    source = open_source(run)
    parts = open_parts(dataset, {}, ("ct",))
    strange = [type(parts[0])("mr", parts[0].rows, parts[0].intensity)]
    with pytest.raises(UserError, match="the run has no prototypes of mr: it has ct, us, xr"):
        assign(dataset, source, tmp_path / "a.parquet", strange)
    assert not (tmp_path / "a.parquet").exists()
