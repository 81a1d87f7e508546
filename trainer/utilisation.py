"""Model FLOP utilisation: what the network's own operations make of a GPU's peak (Chowdhery et al., 2022,
appendix B: forward and backward of the model, nothing that is computed twice or beside it). No torch."""

# Operations/s with 16-bit inputs, dense, of the makers' data sheets; the first name that fits counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
)


def peak_of(device_name: str, precision: str) -> float | None:
    """Operations/s; None for a GPU that is not listed, and for fp32, whose peak depends on settings.

    device_name: as torch.cuda.get_device_name gives it. precision: bf16 | fp16 | fp32.
    """
    if precision == "fp32":
        return None
    words = device_name.replace("-", " ").split()
    for name, peak in PEAKS:
        first, *more = name.split()
        if first in words and all(word in words for word in more):
            return peak
    return None


def figures(flop: float, seconds: float, peak: float | None) -> dict[str, float]:
    """flop: operations of a step on this rank, seconds: of the step. Keys: as orchestration.metrics has
    them."""
    if seconds <= 0:
        return {}
    rate = flop / seconds
    found = {"model_flop_per_second": rate}
    return found if peak is None else found | {"model_flop_utilisation_ratio": rate / peak}
