"""The encoder in the formats of others: safetensors with torchvision's or timm's names, torch.export, ONNX.

Every file is written under another name and renamed; a graph (torch.export, ONNX) is compared with the
network it was made of before that. The description of the encoder travels inside each of them.
"""

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from shards.errors import UserError
from trainer import files
from trainer.embed import Whole, size_for, size_name
from trainer.export import EncoderInfo, info_text, save_encoder
from trainer.whole import whole_shape

Run = Callable[[Tensor], Tensor]
Format = Literal["encoder", "torchvision", "timm", "torch-export", "onnx"]
SUFFIX: dict[Format, str] = {
    "encoder": ".safetensors",
    "torchvision": ".safetensors",
    "timm": ".safetensors",
    "torch-export": ".pt2",
    "onnx": ".onnx",
}
SHARED_NAMES = ("resnet18", "resnet50", "resnet152")  # ours whose names are torchvision's and timm's
INPUT, OUTPUT = "images", "features"
INFO_NAME = "medswav_encoder"
TOLERANCE = 1e-4  # of the largest feature: graph against network


@dataclass(frozen=True)
class Written:
    """`free`: which of batch, height and width a graph leaves open; `error`: largest difference to the
    network, relative to the largest feature; None where nothing was compared."""

    path: Path
    format: Format
    in_channels: int
    free: tuple[str, ...] = ()
    error: float | None = None


def write(
    network: nn.Module,
    info: EncoderInfo,
    kind: Format,
    out: Path,
    channels: int | None = None,
    size: int | None = None,
) -> Written:
    """Write one format.

    channels: 1 or 3 input channels; None: as trained, but 3 for torchvision, whose constructors have no
    other. size: px of the images of a graph whose network takes one size only; None: info.size. Raises
    UserError.
    """
    check_format(info, kind)
    wanted = channels or (3 if kind == "torchvision" else info.in_channels)
    network, info = with_channels(network, info, wanted)
    with files.disk_full_is_clear(f"writing {out.name}"):
        if kind == "encoder":
            save_encoder(out, network, info)
        elif kind in ("torchvision", "timm"):
            tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
            about = {INFO_NAME: info_text(info), "format": "pt"}  # "pt": what timm and others look for
            files.replace_file(out, safetensors.torch.save(tensors, metadata=about))
        else:
            return _write_graph(network, info, kind, out, size_for(info, size))
    return Written(out, kind, info.in_channels)


def check_format(info: EncoderInfo, kind: Format) -> None:
    """Refuse names that a library does not have. Raises UserError."""
    if kind not in ("torchvision", "timm"):
        return
    if info.backbone in SHARED_NAMES or info.backbone.startswith(f"{kind}:"):
        return
    raise UserError(
        f"{kind} has no network like {info.backbone}: use --format encoder (docs/encoders.md has a loader), "
        "torch-export or onnx"
    )


@torch.no_grad()
def with_channels(network: nn.Module, info: EncoderInfo, channels: int) -> tuple[nn.Module, EncoderInfo]:
    """A copy whose first convolution takes 1 or 3 channels, with the same features on grey images.

    1 to 3: a third of the weights on each channel; 3 to 1: their sum. Raises UserError for other numbers.
    """
    if channels == info.in_channels:
        return network, info
    if {channels, info.in_channels} != {1, 3}:
        raise UserError(f"the encoder takes {info.in_channels} channels, which cannot become {channels}")
    changed = copy.deepcopy(network)
    first = next((m for m in changed.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.in_channels != info.in_channels or first.groups != 1:
        raise UserError(f"{info.backbone} does not begin with a convolution: leave --channels away")
    weight = first.weight
    grey = weight.sum(1, keepdim=True) if channels == 1 else (weight / 3).expand(-1, 3, -1, -1)
    first.weight = nn.Parameter(grey.clone())
    first.in_channels = channels
    return changed, replace(info, in_channels=channels)


def _write_graph(network: nn.Module, info: EncoderInfo, kind: Format, out: Path, size: Whole) -> Written:
    with _quiet():
        program, images, free = _traced(network, info.in_channels, size)
        run: Run | None
        if kind == "torch-export":
            data, run = _pt2(program, info)
        else:
            data, run = _onnx(program, info, free)
        error = None if run is None else _largest_error(network, run, images, free)
    if error is not None and not error < TOLERANCE:
        raise UserError(
            f"the {kind} graph of {info.backbone} gives other features than the network (relative difference "
            f"{error:.1e}): nothing was written; use another format"
        )
    files.replace_file(out, data)
    return Written(out, kind, info.in_channels, free, error)


def _traced(network: nn.Module, channels: int, size: Whole) -> tuple[Any, Tensor, tuple[str, ...]]:
    """The program, the images it was traced on, and which of their sizes are free.

    Height and width are, or only the batch where the network takes one size: then that of `size`. Of
    volumes the batch is.
    """
    names = {0: "batch", 2: "height", 3: "width"} if isinstance(size, int) else {0: "batch"}
    examples: dict[tuple[int, ...], Tensor] = {(0,): torch.rand(2, channels, *whole_shape(size))}
    if isinstance(size, int):
        examples = {(0, 2, 3): torch.rand(2, channels, 64, 96)} | examples
    for dims, images in examples.items():
        shapes = (dict.fromkeys(dims, torch.export.Dim.AUTO),)
        try:
            program = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=False)
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        inputs = program.graph_signature.user_inputs
        found = next(node.meta["val"].shape for node in program.graph.nodes if node.name in inputs)
        free = tuple(name for dim, name in names.items() if not isinstance(found[dim], int))
        if dims == (0,) or {"height", "width"} <= set(free):
            return program, images, free
    what = f"images of {size} px" if isinstance(size, int) else f"volumes of {size_name(size)}"
    raise UserError(
        f"torch.export cannot trace this network on {what} "
        f"({problem[:200].rstrip('.')}): give --size, or use --format encoder"
    )


def _pt2(program: Any, info: EncoderInfo) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{INFO_NAME}.json": info_text(info)})
    data = buffer.getvalue()
    return data, torch.export.load(io.BytesIO(data)).module()


def _onnx(program: Any, info: EncoderInfo, free: tuple[str, ...]) -> tuple[bytes, Run | None]:
    """The bytes of the model, and how to run it where onnxruntime is installed."""
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        raise UserError("onnx and onnxscript are not installed: pip install 'medswav[onnx]'")
    made = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    assert made is not None
    model = made.model_proto
    axes = {"batch": 0, "height": 2, "width": 3}
    for name in free:
        model.graph.input[0].type.tensor_type.shape.dim[axes[name]].dim_param = name
    if "batch" in free:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    entry = model.metadata_props.add()
    entry.key, entry.value = INFO_NAME, info_text(info)
    try:
        data = model.SerializeToString()
    except ValueError:
        raise UserError("the network exceeds one ONNX file (2 GiB): use --format torch-export") from None
    if importlib.util.find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


@torch.no_grad()
def _largest_error(network: nn.Module, run: Run, images: Tensor, free: tuple[str, ...]) -> float:
    """On the traced shape and on others, where they are allowed."""
    shapes = [images]
    if "batch" in free:
        shapes.append(images[:1])
    if {"height", "width"} <= set(free):
        shapes.append(torch.rand(3, images.shape[1], 96, 80))
    errors = []
    for example in shapes:
        expected, found = network(example), run(example)
        errors.append(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    return max(errors)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters print what only their authors need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
