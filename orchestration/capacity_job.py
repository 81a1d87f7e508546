"""`medswav capacity`: options and preset to figures, figures to what they come to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestration import capacity_rates as known
from orchestration.capacity import Job, cached_reads, ingest, pretrain, samples_per_second_for
from orchestration.capacity_rates import Cluster, Figure, Rates
from orchestration.simulate import split_samples
from shards.errors import UserError
from shards.schema import is_volumes
from trainer.config import DataConfig, TrainConfig, check_world, load_config
from trainer.rows import SHARED_ROWS
from trainer.sampling import sampling_weights


@dataclass(frozen=True)
class Asked:
    """The options of the command; None where it was not given."""

    images: int
    shares: Mapping[str, float]
    gpus: int
    gpus_per_node: int = 8
    preset: str = "paper_2d_mixed"
    settings: Sequence[str] = ()
    dataset: str = ""
    measure: bool = False
    gpu_kind: str = "v100"
    cores_per_node: int | None = None
    memory_per_node: str | None = None
    storage_bandwidth: str | None = None
    network_bandwidth: str | None = None
    step_seconds: float | None = None
    per_gpu: float | None = None  # samples/s
    per_core: float | None = None  # samples/s
    ingest_per_core: float | None = None  # images/s
    source_bytes: str | None = None
    stored_bytes: str | None = None
    days: float | None = None


def capacity(asked: Asked) -> dict[str, Any]:
    """Plain values: what was reckoned with, ingest, pretraining. Raises UserError."""
    config = load_config(asked.preset, asked.settings)
    check_world(config, asked.gpus)
    images = split_samples(asked.images, asked.shares)
    strange = [m for m in config.data.modalities if m not in images]
    if strange:
        raise UserError(
            f"preset {asked.preset} trains on {strange[0]}, of which there are no images: add --share "
            f"{strange[0]}=..., or --set data.modalities=[{', '.join(images)}] with a batch that fits"
        )
    days = None if asked.days is None else known.positive("--days", asked.days, "days").value
    cluster, rates = _cluster(asked), _rates(asked, config, images)
    job = _job(config, images)
    stages = {
        "ingest": ingest(images, cluster, rates).as_dict(),
        "pretraining": pretrain(images, job, cluster, rates).as_dict(),
    }
    return {
        "images": images,
        "preset": asked.preset,
        "samples": job.samples,
        "batch": job.batch,
        "cluster": {"gpus": cluster.gpus, "nodes": cluster.nodes, "cores": cluster.cores},
        "figures": {name: asdict(one) for name, one in _figures(cluster, rates, job)},
        **stages,
        "passes": {m: job.samples * share / images[m] for m, share in job.shares.items()},
        "caches": [
            {"modalities": held, "bytes": size, "reads_left": left}
            for held, size, left in cached_reads(images, job.shares, rates)
        ],
        "days": days,
        "needed_per_gpu": days and samples_per_second_for(days, job.samples, asked.gpus),
    }


def _job(config: TrainConfig, images: Mapping[str, int]) -> Job:
    from trainer.explain_model import measure_model  # torch, which takes seconds: after what can be refused

    weights = sampling_weights(config.data, images)
    model = measure_model(config)
    return Job(
        samples=config.max_steps * config.data.batch_size,
        batch=config.data.batch_size,
        shares={m: w / sum(weights) for m, w in zip(config.data.modalities, weights, strict=True)},
        crop_bytes=config.views.crop_values,
        parameters=sum(model.parameters.values()),
        checkpoint_bytes=model.checkpoint_bytes,
        checkpoints=config.checkpoint.keep,
        cache_bytes=config.data.cache_bytes,
        tables=_tables(config.data, images),
    )


def _tables(data: DataConfig, images: Mapping[str, int]) -> frozenset[str]:
    """The modalities whose catalogue each process holds for itself (trainer.rows)."""
    fewest = {"none": float("inf"), "auto": SHARED_ROWS}.get(data.catalogue_cache, 0)
    return frozenset(m for m in data.modalities if images[m] < fewest or is_volumes(m))


def _cluster(asked: Asked) -> Cluster:
    cores, memory = known.CORES, known.MEMORY
    if asked.cores_per_node is not None:
        cores = Figure(asked.cores_per_node, cores.unit, "given", "--cores-per-node")
    if asked.memory_per_node is not None:
        memory = known.quantity("--memory-per-node", asked.memory_per_node, memory.unit)
    storage, network = asked.storage_bandwidth, asked.network_bandwidth
    return Cluster(
        asked.gpus,
        -(-asked.gpus // asked.gpus_per_node),
        cores,
        memory,
        known.quantity("--storage-bandwidth", storage, "bytes/s in all") if storage else None,
        known.quantity("--network-bandwidth", network, "bytes/s a node") if network else None,
    )


def _rates(asked: Asked, config: TrainConfig, images: Mapping[str, int]) -> Rates:
    """Given before measured, measured before that of the docs."""
    gpu = _gpu(asked, config)
    views: Mapping[str, Figure] | None = None
    if asked.per_core is not None:
        one = known.positive("--core-rate", asked.per_core, "samples/s and core")
        views = dict.fromkeys(config.data.modalities, one)
    elif not asked.measure:
        views = known.documented_views(config)
    scan, convert, row = known.SCAN, known.CONVERT, known.TABLE_ROW_BYTES
    stored = dict.fromkeys(images, known.STORED_BYTES)
    source = known.SOURCE_BYTES
    if asked.source_bytes is not None:
        source = known.quantity("--source-bytes", asked.source_bytes, source.unit)
    if asked.ingest_per_core is not None:
        convert = known.positive("--ingest-rate", asked.ingest_per_core, convert.unit)
    if asked.stored_bytes is not None:
        own = known.quantity("--stored-bytes", asked.stored_bytes, known.STORED_BYTES.unit)
        stored = dict.fromkeys(images, own)
    if asked.measure:
        from orchestration.capacity_probe import measure

        found = measure(config, asked.dataset)
        scan, row = found.scan, found.table_row_bytes
        views = views or found.views
        convert = convert if asked.ingest_per_core is not None else found.convert
        if asked.dataset and asked.stored_bytes is None:  # generated images do not tell how real ones pack
            stored |= found.stored_bytes
    assert views is not None
    return Rates(scan, convert, source, stored, views, gpu, known.ROW_BYTES, row)


def _gpu(asked: Asked, config: TrainConfig) -> Figure:
    if asked.step_seconds is not None and asked.per_gpu is not None:
        raise UserError("--step-seconds and --gpu-rate say the same thing: give one of them")
    if asked.step_seconds is not None:
        seconds = known.positive("--step-seconds", asked.step_seconds, "s").value
        share = config.data.batch_size / asked.gpus
        return Figure(share / seconds, "samples/s and GPU", "given", f"--step-seconds {seconds:g}")
    if asked.per_gpu is not None:
        return known.positive("--gpu-rate", asked.per_gpu, "samples/s and GPU")
    return known.documented_gpu(config, asked.gpu_kind)


def _figures(cluster: Cluster, rates: Rates, job: Job) -> list[tuple[str, Figure]]:
    return [
        ("cores", cluster.cores_per_node),
        ("memory", cluster.memory_per_node),
        *([("storage", cluster.storage)] if cluster.storage else []),
        *([("network", cluster.network)] if cluster.network else []),
        ("scan", rates.scan),
        ("convert", rates.convert),
        ("source", rates.source_bytes),
        *((f"stored {m}", one) for m, one in rates.stored_bytes.items()),
        *((f"views {m}", one) for m, one in rates.views.items()),
        ("GPU", rates.gpu),
        *([("catalogue", rates.row_bytes)] if job.tables < job.shares.keys() else []),
        *([("of a process", rates.table_row_bytes)] if job.tables else []),
    ]
