"""The model card: Markdown beside an exported encoder, filled from the run. Nothing in it is a path."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from shards import catalog
from shards.errors import UserError
from trainer import journal
from trainer.batches import dataset_fingerprint
from trainer.config import IntensityConfig, TrainConfig
from trainer.export import EncoderInfo
from trainer.formats import INPUT, OUTPUT, Written
from trainer.models.encoders import is_users_own
from trainer.source import Source

NAMES = {"xr": "X-ray", "ct": "CT", "mr": "MR", "us": "Ultrasound", "ct_volumes": "CT volumes"}
_UNKNOWN = "not at hand when this card was written"
_SHOWN = (
    "loss",
    "loss_minus_ln_k",
    "loss_minus_chance",
    "effective_prototypes",
    "dead_prototypes",
    "feature_std",
    "effective_rank",
)


def model_card(source: Source, written: Written) -> str:
    """The whole text. Counts come from the dataset where it is still the one of the run."""
    info, config = source.info, source.config
    steps = f"{info.step:,}"
    if config is not None:
        steps += f" of {config.max_steps:,}" + ("" if source.finished else " (unfinished)")
    parts = [
        f"# {info.backbone}, pretrained on {_listed([NAMES.get(m, m) for m in info.modalities])}",
        _NOTICE,
        f"Made by medswav by {'self-supervised pretraining' if config is None else _METHODS[config.method]}.",
        "## The file",
        _table(_about_file(info, written)),
        "## Loading",
        f"```python\n{loader(info, written, getattr(source.network, 'classifier_name', 'fc'))}\n```",
        _input(info),
        "## Intensity windows",
        _table({NAMES.get(m, m): _window(info.intensity.get(m, IntensityConfig())) for m in info.modalities}),
        "## Data",
        _data(info, config),
        "## Training",
        _table({"Steps": steps, "Seed": str(info.seed), **_training(source)}),
        *_metrics(source),
        "## Limits",
        "\n".join(f"* {line}" for line in _LIMITS),
        "## Licence",
        "TO BE FILLED IN: the licence of these weights. The licence of the code does not decide it; those "
        "who may decide about the images do.",
        *_settings(config),
    ]
    return "\n\n".join(parts) + "\n"


_NOTICE = (
    "**Not a medical device.** For research. The features have not been validated for diagnosis, treatment "
    "or any other clinical decision, and must not be used for one."
)
_METHODS = {
    "swav": "multi-modality SwAV after Ghesu et al., Contrastive self-supervised learning from 100 million "
    "medical images with optional supervision",
    "simclr": "SimCLR (Chen et al. 2020), the baseline",
}
_LIMITS = (
    "The features mirror the scanners, protocols and patients of the data above. Test them before other use.",
    "Whether the data are balanced in age, sex, origin or disease is not recorded here.",
    "An under-trained SwAV can be worse than random features: compare with `medswav probe` on your labels.",
    "Weights can hold traces of training images. Treat them as the agreement on the data demands.",
)


def _input(info: EncoderInfo) -> str:
    if info.volume is None:
        return (
            "Images are grey, in [0, 1], after the window below; no mean is taken out. A whole image is best "
            f"given with its longer side at {info.size_text}."
        )
    crop = "the head in it (trainer.volumes.to_box)" if info.volume.head_crop else "the whole volume in it"
    return (
        f"Volumes are axial, in [0, 1], after the window below, brought to a box of {info.size_text} with "
        f"{crop}: float32 [n, channels, slices, rows, columns]."
    )


def loader(info: EncoderInfo, written: Written, classifier: str = "fc") -> str:
    """Python that loads the file, a few lines. classifier: the layer of torchvision's that was cut off."""
    name, channels = written.path.name, written.in_channels
    axes = "H, W" if info.volume is None else "Z, Y, X"
    if written.format == "torch-export":
        return (
            f"import torch\n\nencoder = torch.export.load({name!r}).module()\n"
            f"features = encoder(images)  # float32 [n, {channels}, {axes}]"
        )
    if written.format == "onnx":
        return (
            f"import onnxruntime\n\nencoder = onnxruntime.InferenceSession({name!r})\n"
            f"features = encoder.run([{OUTPUT!r}], {{{INPUT!r}: images}})[0]"
            f"  # float32 [n, {channels}, {axes}]"
        )
    kind = info.backbone.rpartition(":")[2]
    options = "".join(f", {key}={value!r}" for key, value in sorted(info.backbone_options.items()))
    if written.format == "timm":
        return (
            "import timm\nfrom safetensors.torch import load_file\n\n"
            f"encoder = timm.create_model({kind!r}, in_chans={channels}, num_classes=0{options}).eval()\n"
            f"encoder.load_state_dict(load_file({name!r}))"
        )
    if written.format == "torchvision" and channels == 3:
        return (
            "import torch, torchvision\nfrom safetensors.torch import load_file\n\n"
            f"encoder = torchvision.models.get_model({kind!r}{options}).eval()\n"
            f"encoder.set_submodule({classifier!r}, torch.nn.Identity())\n"
            f"encoder.load_state_dict(load_file({name!r}))"
        )
    named = f", backbone={info.backbone!r}" if is_users_own(info.backbone) else ""
    return (
        "from pathlib import Path\nfrom trainer.export import load_encoder\n\n"
        f"encoder, info = load_encoder(Path({name!r}){named})"
    )


def _about_file(info: EncoderInfo, written: Written) -> dict[str, str]:
    rows = {"Format": written.format, "Network": info.backbone, "Input channels": str(written.in_channels)}
    if info.backbone_options:
        rows["Options"] = json.dumps(info.backbone_options, sort_keys=True)
    if written.format in ("torch-export", "onnx"):
        rows["Free sizes"] = _listed(written.free) if written.free else "none"
        rows["Difference to the network"] = (
            "not compared (onnxruntime is not installed)"
            if written.error is None
            else f"{written.error:.1e} of the largest feature"
        )
    return rows


def _window(intensity: IntensityConfig) -> str:
    if intensity.mode == "fixed":
        return f"centre {intensity.center:g}, width {intensity.width:g}, to [0, 1]"
    if intensity.mode == "recorded":
        return "the window of the DICOM file, else the 0.5th to the 99.5th percentile"
    return "the 0.5th to the 99.5th percentile of the image"


def _data(info: EncoderInfo, config: TrainConfig | None) -> str:
    """Images by modality and split; of the split that was trained on, patients too."""
    rows = {"Fingerprint": f"`{info.dataset_fingerprint}`", "Split": info.split}
    counts = None if config is None else _counts(config, info)
    for modality in info.modalities:
        name = NAMES.get(modality, modality)
        rows[name] = _UNKNOWN if counts is None else counts.get(modality, _UNKNOWN)
    return _table(rows)


def _counts(config: TrainConfig, info: EncoderInfo) -> dict[str, str] | None:
    try:
        if dataset_fingerprint(config.data.dataset) != info.dataset_fingerprint:
            return None
        found = catalog.counts(config.data.dataset, volumes=info.volume is not None)
    except UserError:
        return None
    return {
        modality: ", ".join(f"{split} {count:,}" for split, count in splits.items())
        + (" images" if info.volume is None else " volumes")
        for modality, splits in found.items()
    }


def _training(source: Source) -> dict[str, str]:
    config = source.config
    if config is None:
        return {}
    crops = ", ".join(f"{group.count} of {group.size_text} px" for group in config.views.crops)
    rows = {
        "Batch": f"{config.data.batch_size} images",
        "Crops": crops,
        "Optimiser": f"{config.optim.optimizer}, learning rate {config.optim.learning_rate:g}",
        "Begun with": "random weights",
    }
    if config.method == "swav":
        rows["Prototypes"] = f"{config.swav.prototypes} for each of: {_listed(config.groups)}"
    if config.model.init_weights is not None:
        rows["Begun with"] = config.model.init_weights.rpartition("/")[2]
    return rows


def _metrics(source: Source) -> list[str]:
    """The last logged step of the journal up to the exported one."""
    if source.run_dir is None:
        return []
    rows = journal.read(journal.journal_path(source.run_dir))
    logged = [row for row in rows if row["step"] < source.info.step and any("loss_minus" in n for n in row)]
    if not logged:
        return []
    last = logged[-1]
    parts = {"all": "", **{m: f"m/{m}/" for m in source.info.modalities}}
    table = {
        metric.replace("_", " "): [_number(last.get(f"{start}{metric}")) for start in parts.values()]
        for metric in _SHOWN
    }
    head = ["all", *(NAMES.get(m, m) for m in source.info.modalities)]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {metric} | {' | '.join(values)} |" for metric, values in table.items() if any(values)]
    return [f"### Metrics of step {int(last['step']) + 1:,}", "\n".join(lines)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings(config: TrainConfig | None) -> list[str]:
    if config is None:
        return []
    tree = config.model_dump(mode="json")
    tree["data"]["dataset"] = "(see the fingerprint)"
    for group, name in (("views", "band_statistics"), ("model", "init_weights")):
        if tree[group][name] is not None:
            tree[group][name] = tree[group][name].rpartition("/")[2]
    return [
        "## Settings",
        f"```yaml\n{yaml.safe_dump(tree, sort_keys=False, default_flow_style=None).rstrip()}\n```",
    ]


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else str(last)
