"""One file of any kind to frames and refusals. The boundary at which every failure becomes a reason."""

import stat
from collections.abc import Iterator
from pathlib import Path

from ingest.config import ReadRules
from ingest.dicom.header import quiet
from ingest.frames import Item, Refusal, Refused
from shards.schema import Reason


def read_file(
    path: str, kind: str, modality: str, rules: ReadRules, member: str = "", partner: str = ""
) -> Iterator[Item]:
    """Frames and refusals of a file; at least one item. Raises nothing but what ends the process.

    member: key of a file of the archive at `path` (ingest.archives), "" for itself. kind: as sniffed.
    modality: the partition of a NIfTI or raster file, "none" for an unlisted raster. partner: the image file
    of the header of a NIfTI pair.
    """
    with quiet():
        try:
            if member:
                from ingest.archives import spooled

                with spooled(path, member, rules) as local:
                    yield from _read(local, kind, modality, rules, "")
            else:
                yield from _read(path, kind, modality, rules, partner)
        except Refused as refused:
            found = refused.modality if refused.modality != "none" else modality
            yield Refusal(refused.reason, modality=found)
        except MemoryError:
            yield Refusal(Reason.TOO_LARGE, modality=modality)
        except RecursionError:
            yield Refusal(Reason.UNREADABLE, modality=modality)
        except OSError:
            yield Refusal(Reason.UNREADABLE, modality=modality)
        except Exception:  # noqa: BLE001 - the boundary: no input may end a run, no parser text may leave it
            yield Refusal(Reason.UNREADABLE, modality=modality)


def _read(path: str, kind: str, modality: str, rules: ReadRules, partner: str) -> Iterator[Item]:
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):  # listed as an input only where it cannot be read
        raise Refused(Reason.UNREADABLE)
    if not stat.S_ISREG(mode):
        raise Refused(Reason.NOT_AN_IMAGE)
    # Imported late: a decoder process loads only what its files need.
    if kind == "dicom":
        from ingest.dicom.read import read_dicom

        yield from read_dicom(path, rules)
    elif kind == "nifti":
        from ingest.nifti import read_nifti

        if partner and not stat.S_ISREG(Path(partner).stat().st_mode):
            raise Refused(Reason.PARTNER_MISSING)
        yield from read_nifti(path, modality, rules, partner)
    elif kind == "raster" and modality == "none":
        raise Refused(Reason.NOT_LISTED)
    elif kind == "raster":
        from ingest.raster import read_raster

        yield read_raster(path, modality, rules)
    else:
        with open(path, "rb") as file:  # forbidden or a broken disk: unreadable, not "not an image"
            file.read(1)
        raise Refused(Reason.NOT_AN_IMAGE)
