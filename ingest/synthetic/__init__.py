"""Generated patients: a folder of DICOM, NIfTI and PNG files for the demo and the tests."""

from ingest.synthetic.build import IMAGES, LABELS, PATIENTS, build
from ingest.synthetic.manifest import OK, Manifest, ManifestFile

__all__ = ["IMAGES", "LABELS", "OK", "PATIENTS", "Manifest", "ManifestFile", "build"]
