"""Closed vocabularies: the only words that free text of a source can become in a dataset."""

import re

_MANUFACTURERS = (  # text to look for -> value; the first match counts
    ("siemens", "siemens"),
    ("philips", "philips"),
    ("canon", "canon"),
    ("toshiba", "canon"),
    ("hitachi", "fujifilm"),
    ("fuji", "fujifilm"),
    ("agfa", "agfa"),
    ("carestream", "carestream"),
    ("kodak", "carestream"),
    ("hologic", "hologic"),
    ("samsung", "samsung"),
    ("medison", "samsung"),
    ("mindray", "mindray"),
    ("konica", "konica"),
    ("shimadzu", "shimadzu"),
    ("esaote", "esaote"),
    ("united imaging", "united imaging"),
    ("uih", "united imaging"),
    ("neusoft", "neusoft"),
    ("varian", "varian"),
    ("elekta", "elekta"),
    ("hyperfine", "hyperfine"),
    ("bruker", "bruker"),
    ("acuson", "siemens"),
    ("general electric", "ge"),
)
_GE = re.compile(r"^g\.?\s?e\.?(\s|$)")
BODY_PARTS = frozenset(
    # PS3.16 annex L, the defined terms.
    """ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS CALF
    CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON
    CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE FACE FEMUR FINGER FOOT
    FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS ILEUM ILIUM IAC JAW JEJUNUM KIDNEY KNEE LARYNX
    LEG LIVER LSPINE LSSPINE LUNG MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NOSE ORBIT OVARY
    PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RECTUM RIB SCALP SCAPULA SCLERA SCROTUM SHOULDER
    SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB THYMUS THYROID TLSPINE
    TMJ TOE TONGUE TRACHEA TSPINE UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA""".split()  # noqa: SIM905
)
VIEW_POSITIONS = frozenset(
    "AP PA LL RL LLD RLD LLO RLO LAT LATERAL OBLIQUE CC MLO ML LM XCCL".split()  # noqa: SIM905
)
MANUFACTURERS = frozenset({value for _, value in _MANUFACTURERS} | {"ge", "other"})


def manufacturer(text: str) -> str | None:
    """One of MANUFACTURERS for Manufacturer (0008,0070); None for an empty text."""
    text = text.strip().lower()
    if not text:
        return None
    if _GE.match(text):
        return "ge"
    return next((value for sought, value in _MANUFACTURERS if sought in text), "other")
