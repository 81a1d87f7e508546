"""`medswav capacity`: what ingest and pretraining of so many images need and take. Arithmetic only, no I/O.

Each stage is as fast as its narrowest resource, which is named: rates are added over cores and nodes as if
they scaled evenly, and nothing waits for anything else. So a time is a lower bound, and a need is what keeps
the GPUs busy at their rate.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.capacity_rates import Cluster, Rates
from shards.errors import UserError

WORKER_BYTES = 190e6  # of a process that makes batches, before it opens a dataset (docs/capacity.md)
_OF_MEMORY = 0.8  # of a node: the rest is the object store, the page cache and the system
_BYTES_OF_A_PARAMETER = 4  # gradients are summed in float32


@dataclass(frozen=True)
class Job:
    """A pretraining. shares: of the modalities in a batch; crop_bytes: all uint8 views of a sample."""

    samples: int
    batch: int
    shares: Mapping[str, float]
    crop_bytes: int
    parameters: int
    checkpoint_bytes: int
    checkpoints: int
    cache_bytes: int  # of decoded images, a process
    tables: frozenset[str] = frozenset()  # modalities whose catalogue each process has for itself


@dataclass(frozen=True)
class Stage:
    """`limits`: by resource, what it lets through in units a second; the least is the bottleneck."""

    units: float
    limits: Mapping[str, float]
    needs: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        return min(self.limits, key=self.limits.__getitem__)

    @property
    def rate(self) -> float:
        return self.limits[self.bottleneck]

    @property
    def seconds(self) -> float:
        return self.units / self.rate

    def as_dict(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "per_second": self.rate, "bottleneck": self.bottleneck}
        return own | asdict(self)


def mean_stored(images: Mapping[str, int], rates: Rates) -> float:
    """Bytes of a stored image, over the whole archive."""
    return sum(n * rates.stored_bytes[m].value for m, n in images.items()) / sum(images.values())


def ingest(images: Mapping[str, int], cluster: Cluster, rates: Rates) -> Stage:
    """Units are images."""
    count = sum(images.values())
    core_seconds = {"scan": count / rates.scan.value, "convert": count / rates.convert.value}
    stored = mean_stored(images, rates)
    moved = rates.source_bytes.value + stored  # read and written, of an image
    limits = {"cores": cluster.cores * count / sum(core_seconds.values())}
    if cluster.storage is not None:
        limits["storage"] = cluster.storage.value / moved
    if cluster.network is not None:
        limits["network"] = cluster.nodes * cluster.network.value / moved
    needs = {
        "scan_core_hours": core_seconds["scan"] / 3600,
        "convert_core_hours": core_seconds["convert"] / 3600,
        "source_bytes": count * rates.source_bytes.value,
        "stored_bytes": count * stored,
        # What keeps all cores busy.
        "storage_bytes_per_second": limits["cores"] * moved,
        "network_bytes_per_second_of_a_node": limits["cores"] * moved / cluster.nodes,
    }
    return Stage(count, limits, needs)


def pretrain(images: Mapping[str, int], job: Job, cluster: Cluster, rates: Rates) -> Stage:
    """Units are samples. Raises UserError where no process that makes batches fits into a node."""
    core_seconds = sum(share / rates.views[m].value for m, share in job.shares.items())
    read = sum(share * rates.stored_bytes[m].value for m, share in job.shares.items())
    nodes, gpus = cluster.nodes, cluster.gpus
    wanted = gpus * rates.gpu.value
    # A rank needs a core of its own; the others make batches, a process each, as far as memory goes.
    cores = cluster.cores - gpus
    table = sum(images[m] for m in job.shares if m in job.tables) * rates.table_row_bytes.value
    shared = sum(images[m] for m in job.shares if m not in job.tables) * rates.row_bytes.value
    process = table + job.cache_bytes + WORKER_BYTES
    most = _OF_MEMORY * cluster.memory_per_node.value
    fitting = int((most - shared) / process)
    if fitting < 1:
        raise UserError(
            f"a maker of batches needs {process / 1e9:.1f} GB (its catalogue {table / 1e9:.1f} GB), the "
            f"catalogue of the node {shared / 1e9:.1f} GB, and of a node they may have {most / 1e9:.1f} GB: "
            "raise --memory-per-node"
        )
    limits = {"GPUs": wanted, "memory": nodes * fitting / core_seconds}
    if cores > 0:
        limits["cores"] = cores / core_seconds
    else:
        raise UserError(
            f"{cluster.cores} cores for {gpus} GPUs: each rank takes one, and none is left to make batches; "
            "raise --cores-per-node"
        )
    # Gradients: a ring over the nodes sends and receives 2 (n - 1) / n of them through each node, a step.
    ring = 2 * (nodes - 1) / nodes * _BYTES_OF_A_PARAMETER * job.parameters
    of_a_node = (
        read / nodes + ring / job.batch
    )  # bytes through a node's network, for each sample of all nodes
    if cluster.storage is not None:
        limits["storage"] = cluster.storage.value / read
    if cluster.network is not None:
        limits["network"] = cluster.network.value / of_a_node
    needs = {
        "cores_per_gpu": 1 + rates.gpu.value * core_seconds,
        "storage_bytes_per_second": wanted * read,
        "network_bytes_per_second_of_a_node": wanted * of_a_node,
        "crop_bytes_per_second_of_a_gpu": rates.gpu.value * job.crop_bytes,
        "gradient_bytes_of_a_step": ring,
        "catalogue_bytes_of_a_process": table,
        "catalogue_bytes_of_a_node": shared,
        "process_bytes": process,
        "processes_of_a_node": wanted * core_seconds / nodes,
        "processes_that_fit": fitting,
        "memory_of_a_node": shared + process * wanted * core_seconds / nodes,
        "checkpoint_bytes": job.checkpoints * job.checkpoint_bytes,
        "bytes_read": job.samples * read,
    }
    return Stage(job.samples, limits, needs)


def samples_per_second_for(days: float, samples: int, gpus: int) -> float:
    """What each GPU has to do to be done in so many days (method.md 3-F: 271 for the paper's 14)."""
    return samples / (gpus * days * 86400)


def cached_reads(
    images: Mapping[str, int], shares: Mapping[str, float], rates: Rates
) -> list[tuple[list[str], float, float]]:
    """(modalities, their bytes, part of the read bytes that is left) of a cache that holds whole modalities.

    In the order in which a byte of cache saves most reads: an equal part of a batch is drawn from few X-rays.
    """
    size = {m: images[m] * rates.stored_bytes[m].value for m in shares}
    read = {m: share * rates.stored_bytes[m].value for m, share in shares.items()}
    order = sorted(shares, key=lambda m: size[m] / read[m])
    found = []
    for end in range(1, len(order)):
        held = order[:end]
        left = sum(read[m] for m in order[end:]) / sum(read.values())
        found.append((held, sum(size[m] for m in held), left))
    return found
