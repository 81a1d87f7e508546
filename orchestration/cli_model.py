"""`medswav export`, `embed` and `assign`: what a pretrained encoder is good for. Thin, like cli.py."""

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from orchestration.model_job import Images

Backbone = Annotated[
    str | None,
    typer.Option(help="package.module:function of the encoder, where it is your own code: name it again."),
]
Modalities = Annotated[
    list[str] | None,
    typer.Option("--modality", help="Only this one; may be repeated. Default: the encoder's."),
]
SplitName = Annotated[str | None, typer.Option("--split", help="train, val or test; default: all.")]
Size = Annotated[int | None, typer.Option(min=8, help="px of an image; default: as recorded in the encoder.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a forward.")]
Threads = Annotated[int, typer.Option(min=1, help="Decoding threads.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="A summary as JSON.")]


class FormatName(StrEnum):
    encoder = "encoder"
    torchvision = "torchvision"
    timm = "timm"
    torch_export = "torch-export"
    onnx = "onnx"


class DtypeName(StrEnum):
    float32 = "float32"
    float16 = "float16"


def _images(
    dataset: Annotated[Path, typer.Option(help="Dataset: folder, s3://..., gs://...")],
    modality: Modalities = None,
    split: SplitName = None,
    size: Size = None,
    batch_size: BatchSize = 64,
    threads: Threads = 2,
    device: Device = "auto",
) -> "Images":
    from orchestration.model_job import Images

    return Images(dataset, modality, split, size, batch_size, threads, device)


def _with_images(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of _images, from which its first argument is made."""
    asked, own = inspect.signature(_images).parameters, inspect.signature(command)

    @wraps(command)
    def called(**values: Any) -> None:
        images = _images(**{name: values.pop(name) for name in asked})
        command(images, **values)

    _, *rest = own.parameters.values()
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*asked.values(), *rest)]
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for command in (export, embed, assign):
        app.command()(command)


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|ENCODER", help="Run folder or encoder.safetensors.")],
    out: Annotated[
        Path, typer.Option(help="File to write: .safetensors, .pt2 or .onnx; a card goes beside.")
    ],
    format_: Annotated[
        FormatName, typer.Option("--format", help="encoder: ours, which `trainer.export` loads.")
    ] = FormatName.encoder,
    channels: Annotated[
        int | None,
        typer.Option(min=1, max=3, help="1 or 3 input channels; default: as trained, torchvision: 3."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="px, for graphs of networks that take one size only.")
    ] = None,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Write an encoder for other programs, with a model card; an unfinished run gives its newest checkpoint.

    Example: medswav export RUN --format torchvision --out resnet50.safetensors
    """
    from orchestration.model_job import export

    typer.echo(export(source, out, format_.value, channels, size, backbone, as_json))


@_with_images
def embed(
    images: "Images",
    encoder: Annotated[Path, typer.Option(help="encoder.safetensors, or a run folder.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    dtype: Annotated[DtypeName, typer.Option(help="Of the features.")] = DtypeName.float32,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Features of every image, to Parquet by key: columns key, modality, split, features.

    Example: medswav embed --dataset DATASET --encoder RUN/encoder.safetensors --out features.parquet
    """
    from orchestration.model_job import embed

    typer.echo(embed(images, encoder, out, dtype.value, backbone, as_json))


@_with_images
def assign(
    images: "Images",
    run: Annotated[Path, typer.Option(help="Run folder: prototypes are in its checkpoints.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    sheet: Annotated[
        Path | None,
        typer.Option(help="HTML page of the images nearest to each prototype: pixels of patients."),
    ] = None,
    nearest: Annotated[int, typer.Option(min=1, max=64, help="sheet: images of a prototype.")] = 8,
    prototypes: Annotated[int, typer.Option(min=1, help="sheet: the most used ones of a modality.")] = 24,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Nearest prototype and cosine distance of every image, to Parquet by key; a contact sheet.

    Example: medswav assign --dataset DATASET --run RUN --out assigned.parquet --sheet prototypes.html
    """
    from orchestration.model_job import Sheet, assign

    page = None if sheet is None else Sheet(sheet, nearest, prototypes)
    typer.echo(assign(images, run, out, page, backbone, as_json))
