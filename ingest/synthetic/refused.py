"""Files that ingest must refuse, each with the reason it must give."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG4HP41,
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    UltrasoundImageStorage,
)

from ingest.synthetic.identity import Person, header, make_person, uid
from ingest.synthetic.manifest import ManifestFile
from ingest.synthetic.syntaxes import save, set_pixels
from shards.schema import Reason

_FOLDER = "other"


def write_refused(
    folder: Path, seed: int, twin_of: ManifestFile | None
) -> tuple[list[ManifestFile], tuple[str, ...]]:
    """Write them below folder/other; `twin_of`: the accepted file to copy. Returns files and identities."""
    rng = np.random.default_rng([seed, 1000])
    person = make_person(rng, f"OTHER{seed:02d}-{rng.integers(10**6)}")
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    pixels = (1000 + 200 * rng.standard_normal((120, 120))).clip(0, 4095).astype(np.uint16)
    make = _Maker(folder / _FOLDER, seed, person, pixels)
    files = [
        ManifestFile(f"{_FOLDER}/{name}", str(reason), modality, write(make, name))
        for name, (reason, modality, write) in _KINDS.items()
    ]
    if twin_of is not None:
        # Whichever of the two ingest meets first is kept: the copy is refused, or else its original.
        shutil.copyfile(folder / twin_of.file, folder / _FOLDER / "zz_copy")
        files.append(
            ManifestFile(
                f"{_FOLDER}/zz_copy",
                str(Reason.DUPLICATE),
                twin_of.modality,
                twin_of.syntax,
                twin_of.label,
                twin_of.patient,
            )
        )
    return files, person.texts()


class _Maker:
    """Common parts of the refused data sets."""

    def __init__(self, folder: Path, seed: int, person: Person, pixels: np.ndarray) -> None:
        self.folder, self.seed, self.person, self.pixels = folder, seed, person, pixels

    def data(self, name: str, modality: str, sop_class: str) -> Dataset:
        """A data set without an image, ready to save."""
        where = (self.seed, "refused")
        data = header(self.person, modality, sop_class, uid(*where), uid(*where, name), uid(*where, name, 1))
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.InstanceNumber = 1
        return data

    def image(self, name: str, modality: str, sop_class: str, pixels: np.ndarray | None = None) -> Dataset:
        data = self.data(name, modality, sop_class)
        # Every file its own pixels: none of them is the duplicate of another.
        own = np.roll(self.pixels, sum(name.encode()), axis=1) if pixels is None else pixels
        set_pixels(data, own[None], 12, ExplicitVRLittleEndian, "MONOCHROME2")
        return data

    def save(self, data: Dataset, name: str) -> str:
        save(data, self.folder / name)
        return str(data.file_meta.TransferSyntaxUID)


def _text(make: _Maker, name: str) -> str:
    (make.folder / name).write_text(
        f"Dear colleague, {make.person.name} was seen on {make.person.study_date}.\n" * 20
    )
    return "none"


def _truncated(make: _Maker, name: str) -> str:
    syntax = make.save(make.image(name, "CT", CTImageStorage), name)
    path = make.folder / name
    path.write_bytes(path.read_bytes()[:-9000])
    return syntax


def _report(make: _Maker, name: str) -> str:
    data = make.data(name, "SR", BasicTextSRStorage)
    data.ValueType, data.ContinuityOfContent = "CONTAINER", "SEPARATE"
    item = Dataset()
    item.RelationshipType, item.ValueType = "CONTAINS", "TEXT"
    item.TextValue = f"{make.person.name} has no complaint."
    data.ContentSequence = Sequence([item])
    return make.save(data, name)


def _segmentation(make: _Maker, name: str) -> str:
    data = make.image(name, "SEG", SegmentationStorage, (make.pixels > 1100).astype(np.uint8))
    data.BitsStored, data.HighBit = 8, 7
    data.ImageType = ["DERIVED", "PRIMARY"]
    return make.save(data, name)


def _screenshot(make: _Maker, name: str) -> str:
    screen = np.zeros((120, 160), np.uint8)
    cv2.putText(screen, make.person.number, (4, 60), cv2.FONT_HERSHEY_PLAIN, 0.8, 255, 1)
    data = make.image(name, "CT", SecondaryCaptureImageStorage, screen.astype(np.uint16) * 16)
    data.ImageType, data.BurnedInAnnotation, data.ConversionType = ["DERIVED", "SECONDARY"], "YES", "WSD"
    return make.save(data, name)


def _directory(make: _Maker, name: str) -> str:
    data = make.data(name, "", MediaStorageDirectoryStorage)
    del data.Modality
    record = Dataset()
    record.OffsetOfTheNextDirectoryRecord, record.RecordInUseFlag = 0, 0xFFFF
    record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
    record.DirectoryRecordType, record.PatientName = "PATIENT", make.person.name
    data.DirectoryRecordSequence = Sequence([record])
    return make.save(data, name)


def _no_pixels(make: _Maker, name: str) -> str:
    data = make.image(name, "CT", CTImageStorage)
    del data.PixelData
    return make.save(data, name)


def _no_modality(make: _Maker, name: str) -> str:
    data = make.image(name, "CT", CTImageStorage)
    data.Modality = ""
    return make.save(data, name)


def _tiny(make: _Maker, name: str) -> str:
    return make.save(make.image(name, "CT", CTImageStorage, make.pixels[:24, :24]), name)


def _blank(make: _Maker, name: str) -> str:
    return make.save(
        make.image(name, "CR", ComputedRadiographyImageStorage, np.full((96, 96), 77, np.uint16)), name
    )


def _other(modality: str, sop_class: str) -> Callable[[_Maker, str], str]:
    return lambda make, name: make.save(make.image(name, modality, sop_class), name)


def _bare(make: _Maker, name: str) -> str:
    data = make.image(name, "CT", CTImageStorage)
    del data.file_meta
    dcmwrite(make.folder / name, data, implicit_vr=True, little_endian=True)
    return str(ImplicitVRLittleEndian)


def _video(make: _Maker, name: str) -> str:
    data = make.image(name, "US", UltrasoundImageStorage)
    data.file_meta.TransferSyntaxUID = MPEG4HP41
    data.add_new(0x7FE00010, "OB", encapsulate([b"\0\0\0\x18ftypmp42" + bytes(500)]))
    data["PixelData"].is_undefined_length = True
    return make.save(data, name)


def _label_map(make: _Maker, name: str) -> str:
    image = nib.Nifti1Image(
        (make.pixels[:64, :64, None] > 1100).repeat(4, axis=2).astype(np.int16), np.eye(4)
    )
    image.header.set_intent("label")
    (make.folder / name).write_bytes(image.to_bytes())
    return "nifti"


def _unlisted(make: _Maker, name: str) -> str:
    (make.folder / name).write_bytes(cv2.imencode(".png", make.pixels.astype(np.uint16))[1].tobytes())
    return "png"


_KINDS: dict[str, tuple[Reason, str, Callable[[_Maker, str], str]]] = {
    "letter.dcm": (Reason.NOT_AN_IMAGE, "none", _text),
    "cut.dcm": (Reason.UNREADABLE, "ct", _truncated),
    "report.dcm": (Reason.SOP_CLASS_OUT_OF_SCOPE, "none", _report),
    "segments.dcm": (Reason.SOP_CLASS_OUT_OF_SCOPE, "none", _segmentation),
    "screen.dcm": (Reason.BURNED_IN_RISK, "ct", _screenshot),
    "DICOMDIR": (Reason.DICOMDIR, "none", _directory),
    "headeronly.dcm": (Reason.NO_PIXEL_DATA, "ct", _no_pixels),
    "unnamed.dcm": (Reason.NO_MODALITY, "none", _no_modality),
    "stamp.dcm": (Reason.TOO_SMALL, "ct", _tiny),
    "blank.dcm": (Reason.CONSTANT, "xr", _blank),
    "pet.dcm": (Reason.MODALITY_OUT_OF_SCOPE, "none", _other("PT", PositronEmissionTomographyImageStorage)),
    "thing.dcm": (Reason.MODALITY_OUT_OF_SCOPE, "none", _other("OT", ComputedRadiographyImageStorage)),
    "bare.dcm": (Reason.NO_PART10_HEADER, "none", _bare),
    "video.dcm": (Reason.TRANSFER_SYNTAX, "us", _video),
    "noregion.dcm": (Reason.BURNED_IN_RISK, "us", _other("US", UltrasoundImageStorage)),
    "atlas.nii": (Reason.LABEL_MAP, "mr", _label_map),
    "unlisted.png": (Reason.NOT_LISTED, "none", _unlisted),
}
