"""Made-up people, and the deterministic UIDs and header fields that go with them."""

import hashlib
from dataclasses import dataclass

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID

from ingest.synthetic.fields import Random

_FAMILY = (
    "Quillfeather", "Brambleworth", "Zandervliet", "Okonkwofield", "Harrowgatesen", "Lindqvistova",
    "Mbekiwright", "Tanakamura", "Osterhausen", "Vasquezian", "Featherstonehaugh", "Krzyzanowiak",
)  # fmt: skip
_GIVEN = (
    "Marianne", "Theobald", "Ingeborg", "Casimir", "Yevgenia", "Bartholomew", "Shirin", "Anselmo", "Philippa",
    "Takumi", "Rosalind", "Emeka",
)  # fmt: skip
_PLACE = ("Saint Ethelburga Infirmary", "Kreisklinik Nebelstadt", "Hospital Valle Imaginado")
_STREET = ("17 Larkspur Crescent, Mythholm", "Dichterweg 4, Nebelstadt", "Calle Invento 22, Imaginado")


@dataclass(frozen=True)
class Person:
    name: str  # family^given
    number: str  # PatientID
    birth_date: str
    sex: str
    age: int
    institution: str
    address: str
    phone: str
    physician: str
    accession: str
    study_date: str

    def texts(self) -> tuple[str, ...]:
        """Everything that identifies the person."""
        family, given = self.name.split("^")
        own = (self.name, family, given, self.number, self.birth_date, self.institution, self.address)
        return (*own, self.phone, self.physician, self.accession, self.study_date)


def make_person(rng: Random, number: str) -> Person:
    def one(values: tuple[str, ...]) -> str:
        return values[int(rng.integers(len(values)))]

    year, age = int(rng.integers(2011, 2022)), int(rng.integers(21, 97))
    month, day = (int(rng.integers(1, high)) for high in (13, 29))
    return Person(
        name=f"{one(_FAMILY)}^{one(_GIVEN)}",
        number=number,
        birth_date=f"{year - age}{month:02d}{day:02d}",
        sex=one(("M", "F", "F", "M", "O")),
        age=age,
        institution=one(_PLACE),
        address=one(_STREET),
        phone=f"+49-555-{int(rng.integers(10**6, 10**7))}",
        physician=f"{one(_FAMILY)}^{one(_GIVEN)}^^Dr",
        accession=f"ACC{int(rng.integers(10**7, 10**8))}",
        study_date=f"{year}{month:02d}{day:02d}",
    )


def uid(*parts: object) -> UID:
    """A valid, deterministic UID below 2.25 (an integer of 120 bits)."""
    text = "/".join(str(part) for part in parts)
    return UID(f"2.25.{int.from_bytes(hashlib.blake2b(text.encode(), digest_size=15).digest(), 'big')}")


def header(person: Person, modality: str, sop_class: str, study: str, series: str, instance: str) -> Dataset:
    """A data set with identity at top level, in a private block and in nested sequences; no image yet."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    data.file_meta.MediaStorageSOPInstanceUID = UID(instance)
    data.file_meta.ImplementationClassUID = uid("medswav", "synthetic")
    data.SpecificCharacterSet = "ISO_IR 100"
    data.SOPClassUID, data.SOPInstanceUID = UID(sop_class), UID(instance)
    data.StudyInstanceUID, data.SeriesInstanceUID = UID(study), UID(series)
    data.Modality = modality
    data.PatientName, data.PatientID = person.name, person.number
    data.PatientBirthDate, data.PatientSex, data.PatientAge = (
        person.birth_date,
        person.sex,
        f"{person.age:03d}Y",
    )
    data.PatientAddress, data.PatientTelephoneNumbers = person.address, person.phone
    data.InstitutionName, data.InstitutionAddress = person.institution, person.address
    data.ReferringPhysicianName = person.physician
    data.AccessionNumber, data.StudyID = person.accession, person.accession[-6:]
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = person.study_date
    data.StudyTime = data.SeriesTime = data.ContentTime = "101530"
    data.StudyDescription = f"Follow-up of {person.name.replace('^', ', ')}"
    data.PatientComments = f"call {person.phone}"
    data.ImageType = ["ORIGINAL", "PRIMARY"]
    _nest(data, person)
    return data


def _nest(data: Dataset, person: Person) -> None:
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID = f"X{person.number}", person.institution
    data.OtherPatientIDsSequence = Sequence([other])
    step = Dataset()
    step.ScheduledProcedureStepDescription = f"for {person.name.replace('^', ' ')}"
    request = Dataset()
    request.RequestingPhysician = person.physician
    request.ReferencedRequestSequence = Sequence([step])
    data.RequestAttributesSequence = Sequence([request])
    block = data.private_block(0x0009, "MYTHHOLM HEADER 1", create=True)
    block.add_new(0x01, "LO", person.name)
    block.add_new(0x02, "LT", f"{person.number} {person.birth_date} {person.address}")
