"""`medswav doctor`: is this machine able to do the work? A line a check, with the fix where it is not ok."""

import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ingest.dicom.syntaxes import DECODERS, SUPPORTED, check_decoders, undecodable
from orchestration.doctor_folders import Check, check_folder
from shards.errors import UserError

# Module, package to install, what it is for: beside the decoders of DICOM.
OTHERS = (
    ("pydicom", "pydicom", "DICOM"),
    ("nibabel", "nibabel", "NIfTI"),
)
HEAD_PORTS = {6379: "--port", 8265: "--dashboard-port"}  # of `ray start --head`


def run_checks(folders: Sequence[Path] = ()) -> list[Check]:
    """All checks; `folders` are where datasets or runs are to be written (default: the working directory)."""
    found = [
        _python(),
        *[_module(*module) for module in (*OTHERS, *DECODERS)],
        _syntaxes(),
        *[check for folder in folders or (Path.cwd(),) for check in check_folder(folder)],
        _object_store(Path("/dev/shm")),
        _ports(),
        _head_ports(),
        *_torch(),
        _ray(),
        token(os.environ),
        _key(),
    ]
    return found


def text_of(checks: Sequence[Check]) -> str:
    """For people: a line a check, the fix below it, and what it comes to."""
    lines = []
    for check in checks:
        lines.append(f"{check.level:8} {check.name:26} {check.detail}")
        if check.fix:
            lines.append(f"{'':8} {'':26} fix: {check.fix}")
    counts = {level: sum(c.level == level for c in checks) for level in ("failed", "warning")}
    if not any(counts.values()):
        return "\n".join([*lines, "all is well"])
    told = [
        f"{count} {level}{'s' * (level == 'warning' and count > 1)}"
        for level, count in counts.items()
        if count
    ]
    return "\n".join([*lines, ", ".join(told)])


def _python() -> Check:
    text = f"{sys.version_info.major}.{sys.version_info.minor}, {os.cpu_count()} CPUs"
    return Check("python", "ok", text)


def _module(module: str, package: str, purpose: str) -> Check:
    try:
        import_module(module)
    except ImportError as error:
        why = "not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        return Check(package, "failed", f"{purpose}: {why}", f"pip install {package}")
    return held_to(package, version_of(package), _wanted(package), purpose)


def held_to(package: str, found: str, least: str, purpose: str) -> Check:
    """least: the oldest version that this package says it works with, or empty."""
    if least and _numbers(found) < _numbers(least):
        return Check(package, "failed", f"{found} ({purpose})", f"pip install '{package}>={least}'")
    return Check(package, "ok", f"{found} ({purpose})")


def _wanted(package: str) -> str:
    """The lower bound that medswav's own metadata gives."""
    try:
        listed = requires("medswav") or []
    except PackageNotFoundError:
        return ""
    for item in listed:
        match = re.match(rf"{re.escape(package)}(?:\[[^\]]*\])?\s*>=\s*([0-9.]+)", item)
        if match:
            return match.group(1)
    return ""


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]


def _syntaxes() -> Check:
    """What ingest checks when it starts, and more: that pydicom's plugins for the packages load."""
    try:
        check_decoders()
        broken = undecodable()
    except (UserError, ImportError) as error:
        return Check("transfer syntaxes", "failed", str(error), "install the packages that are named above")
    if broken:
        text = f"no working decoder for {', '.join(broken)}"
        return Check("transfer syntaxes", "failed", text, "reinstall the packages above")
    return Check("transfer syntaxes", "ok", f"all {len(SUPPORTED)} decode")


def _object_store(path: Path) -> Check:
    """A local Ray keeps its object store there; a node of a cluster takes 30 % of its memory."""
    from orchestration.cluster import OBJECT_STORE_BYTES

    if not path.is_dir():
        fix = "mount a tmpfs there: without it Ray keeps its object store on disk, slowly"
        return Check("object store", "warning", f"{path} is not there", fix)
    free = shutil.disk_usage(path).free
    text = f"{free / 1e9:.1f} GB free in {path}; a local Ray takes {OBJECT_STORE_BYTES / 1e9:.1f} GB and more"
    if free < 3 * OBJECT_STORE_BYTES:
        fix = "a larger one: --shm-size=2g of the container, a memory volume in Kubernetes"
        return Check("object store", "warning", text, fix)
    return Check("object store", "ok", text)


def _ports() -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen()
            with socket.create_connection(probe.getsockname(), timeout=2):
                pass
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        fix = (
            "Ray and the ranks talk over TCP: allow it on the loopback, and put the host name into /etc/hosts"
        )
        return Check("ports", "failed", str(error.strerror or error), fix)
    return Check("ports", "ok", "local TCP works, the host name resolves")


def _head_ports() -> Check:
    taken = [port for port in HEAD_PORTS if _listens(port)]
    if not taken:
        return Check("ports of a head node", "ok", f"{', '.join(map(str, HEAD_PORTS))} are free")
    options = " ".join(f"{HEAD_PORTS[port]} N" for port in taken)
    fix = f"if that is your Ray, all is well; a second head needs `ray start --head {options}`"
    return Check("ports of a head node", "warning", f"{', '.join(map(str, taken))} taken", fix)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _torch() -> list[Check]:
    try:
        import torch
    except ImportError:
        return [Check("torch", "failed", "not installed", "pip install torch")]
    found = held_to("torch", torch.__version__, _wanted("torch"), "training")
    if not torch.distributed.is_available():
        found = Check(
            "torch", "failed", f"{torch.__version__} without torch.distributed", "another build of it"
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [found, gpu(names, nccl, torch.version.cuda, Path("/dev/nvidia0").exists(), _gpu_adds)]


def _gpu_adds() -> str | None:
    """Why the GPU does not compute, or None."""
    import torch

    try:
        return None if float((torch.ones(8, device="cuda") + 1).sum()) == 16 else "it computes a wrong sum"
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]


def gpu(
    names: Sequence[str], nccl: str | None, cuda: str | None, device_file: bool, tried: object = None
) -> Check:
    """names: of the GPUs that torch sees; nccl, cuda: versions that torch was built with; device_file: the
    driver has one; tried: a function that says why the first one does not compute."""
    if not names:
        if device_file:
            build = f"built for CUDA {cuda}" if cuda else "a CPU build"
            fix = "install the torch build for the CUDA version of the driver (nvidia-smi shows it)"
            return Check("GPU and NCCL", "failed", f"there is a GPU that torch ({build}) cannot use", fix)
        return Check("GPU and NCCL", "ok", "no GPU: training runs on CPUs")
    text = f"{len(names)} x {names[0]}, CUDA {cuda}, NCCL {nccl or 'none'}"
    if nccl is None:
        return Check(
            "GPU and NCCL", "failed", text, "ranks talk through NCCL: install a torch build that has it"
        )
    trouble = tried() if callable(tried) else None
    if trouble:
        fix = "update the driver, or install the torch build for its CUDA version (nvidia-smi shows it)"
        return Check("GPU and NCCL", "failed", f"{text}: {trouble}", fix)
    return Check("GPU and NCCL", "ok", text)


def _ray() -> Check:
    from orchestration.cluster import prepare_environment, wanted_address

    prepare_environment()
    try:
        import ray
    except ImportError:
        return Check("ray", "failed", "not installed", "pip install 'ray[default,train]'")
    address = wanted_address(None)
    where = f"RAY_ADDRESS={address}" if address else "local"
    return held_to("ray", ray.__version__, _wanted("ray"), where)


def token(environment: Mapping[str, str]) -> Check:
    """What `ray start` and the jobs of a cluster prove themselves with. No token is shown."""
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    if environment.get("RAY_AUTH_TOKEN"):
        fix = (
            "put it into a file of mode 0600 and name that in RAY_AUTH_TOKEN_PATH: others see an environment"
        )
        return Check("token", "warning", "RAY_AUTH_TOKEN is set", fix)
    if not path:
        fix = "make a file with a token, mode 0600, the same on every node, and set RAY_AUTH_TOKEN_PATH to it"
        if environment.get("RAY_ADDRESS"):
            return Check("token", "warning", "none is named, and RAY_ADDRESS names a cluster", fix)
        return Check("token", "ok", "none is named: a local Ray makes its own for each command")
    try:
        found = Path(path).stat()
    except OSError as error:
        fix = "name a file that is there and that the user of the job can read"
        return Check("token", "failed", f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}", fix)
    if stat.S_IMODE(found.st_mode) & 0o077:
        return Check("token", "failed", f"others may read or change {path}", f"chmod 600 {path}")
    if found.st_size == 0:
        return Check("token", "failed", f"{path} is empty", "write a token into it, the same on every node")
    return Check("token", "ok", f"{path}, for its owner only")


def _key() -> Check:
    from shards.ids import KEY_VARIABLE

    if os.environ.get(KEY_VARIABLE):
        return Check("key", "ok", f"{KEY_VARIABLE} is set")
    text = f"{KEY_VARIABLE} is not set: give ingest a --key FILE (`ingest key FILE` creates one)"
    return Check("key", "ok", text)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"
