"""torchvision, timm and modules of the user, imported so that what is wrong is said in one line."""

import importlib
import importlib.metadata
import importlib.util
import logging
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from shards.errors import UserError

log = logging.getLogger(__name__)
_FIX = "install the pair that belongs together: pip install torch torchvision gives one"


def torchvision() -> ModuleType:
    """The package torchvision. Raises UserError where it is missing or made for another torch.

    The wheels of the Python package index are linked against the CUDA build of torch. Beside the CPU build
    of the same version their compiled operators (NMS and the like) cannot be loaded, and then the import of
    the whole package fails although no encoder uses them. In that case the names of the operators are
    declared, without code behind them, and the log says so: encoders work, and a call of such an operator
    fails with torchvision's own words.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise UserError("torchvision is not installed: pip install 'medswav[torchvision]'")
    _check_torchvision_version()
    _declare_operators()
    try:
        return importlib.import_module("torchvision.models") and importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"torchvision cannot be imported ({_line(error)}): {_FIX}") from None


def timm() -> ModuleType:
    """The package timm, which needs torchvision. Raises UserError."""
    if importlib.util.find_spec("timm") is None:
        raise UserError("timm is not installed: pip install 'medswav[timm]'")
    torchvision()
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise UserError(f"timm cannot be imported ({_line(error)})") from None


def users_module(name: str) -> ModuleType:
    """A module that the user's configuration names. Raises UserError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the module {name} of model.backbone cannot be imported ({_line(error)}): install it, or add "
            "its folder to PYTHONPATH"
        ) from None


def _check_torchvision_version() -> None:
    """Each release of torchvision names the one torch it is built for."""
    for wanted in importlib.metadata.requires("torchvision") or ():
        name, _, version = wanted.replace("(", "").replace(")", "").replace(" ", "").partition("==")
        if name == "torch" and version and version != torch.__version__.partition("+")[0]:
            raise UserError(
                f"torchvision {importlib.metadata.version('torchvision')} is built for torch {version}, "
                f"and torch {torch.__version__} is installed: {_FIX}"
            )


@lru_cache(maxsize=1)
def _declare_operators() -> torch.library.Library | None:
    """Declared operators live as long as what is returned; None where the compiled part loads."""
    spec = importlib.util.find_spec("torchvision")
    places = (spec.submodule_search_locations or ()) if spec is not None else ()
    compiled = next((file for place in places for file in Path(place).glob("_C*.so")), None)
    if compiled is None:
        return None
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        log.info("torchvision's compiled operators are of another build of torch: its models work without")
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # those whose absence stops the import
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
