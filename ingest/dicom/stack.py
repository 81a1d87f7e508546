"""What of a header tells stacks of one series at the same places apart: echoes, time points, b-values."""

from pydicom.dataset import Dataset

from ingest.dicom import header
from ingest.dicom.geometry import group_item, is_enhanced
from ingest.frames import Stack

_FRAME_TYPES = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
_TIME_DIGITS = 3  # of ms and s/mm2: writers print noise behind them


def stack_of(dataset: Dataset, index: int, frames: int) -> Stack | None:
    """Of a frame; None for one of a cine, which has no place of its own (PS3.3 C.7.6.16 gives it one)."""
    if is_enhanced(dataset):
        return _of_frame(dataset, index)
    return _of_image(dataset) if frames == 1 else None


def _of_image(dataset: Dataset) -> Stack:
    kind = "/".join(header.texts(dataset, "ImageType"))
    return Stack(
        (kind, header.text(dataset, "EchoNumbers")),
        (
            _number(dataset, "EchoTime"),
            header.text(dataset, "TemporalPositionIdentifier"),
            _diffusion(dataset, "DiffusionGradientOrientation"),
            _number(dataset, "TriggerTime"),
            _number(dataset, "FrameReferenceTime"),
            _number(dataset, "KVP"),
            "/".join(header.texts(dataset, "ConvolutionKernel")),
            header.text(dataset, "AcquisitionNumber"),
            header.text(dataset, "AcquisitionTime"),
        ),
    )


def _of_frame(dataset: Dataset, index: int) -> Stack:
    """The functional groups of an enhanced object (PS3.3 C.7.6.16, C.8.13, C.8.15)."""
    content = group_item(dataset, index, "FrameContentSequence") or Dataset()
    echo = group_item(dataset, index, "MREchoSequence") or Dataset()
    diffusion = group_item(dataset, index, "MRDiffusionSequence") or Dataset()
    direction = header.item(diffusion, "DiffusionGradientDirectionSequence") or diffusion
    heart = group_item(dataset, index, "CardiacSynchronizationSequence") or Dataset()
    energy = group_item(dataset, index, "CTXRayDetailsSequence") or Dataset()
    types = (group_item(dataset, index, name) for name in _FRAME_TYPES)
    kind = next(("/".join(header.texts(t, "FrameType")) for t in types if t is not None), "")
    return Stack(
        (kind, header.text(content, "StackID")),
        (
            _number(echo, "EffectiveEchoTime"),
            header.text(content, "TemporalPositionIndex"),
            _number(diffusion, "DiffusionBValue")
            + "/".join(header.texts(direction, "DiffusionGradientOrientation")),
            _number(heart, "NominalCardiacTriggerDelayTime"),
            _number(energy, "KVP"),
            header.text(content, "FrameAcquisitionNumber"),
            header.text(dataset, "SOPInstanceUID"),
        ),
    )


def _diffusion(dataset: Dataset, direction: str) -> str:
    return _number(dataset, "DiffusionBValue") + "/".join(header.texts(dataset, direction))


def _number(dataset: Dataset, keyword: str) -> str:
    found = header.number(dataset, keyword)
    return "" if found is None else str(round(found, _TIME_DIGITS))
