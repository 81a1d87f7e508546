"""The limits on reading sources, shared by the workers of a job: one bucket in a small actor.

The actor lives on the driver's node and ends with the driver. Only byte counts and seconds travel.
"""

from typing import TYPE_CHECKING, Any

from orchestration.cluster import runtime_env

if TYPE_CHECKING:
    from ingest.config import IngestConfig
    from ingest.limits import Meter


class _Bucket:
    """The actor: ingest.limits.TokenBucket by this node's clock. Restarted, it begins with an empty one."""

    def __init__(self, bytes_per_second: int) -> None:
        from ingest.limits import TokenBucket

        self._bucket = TokenBucket(bytes_per_second)

    def reserve(self, count: int) -> float:
        return self._bucket.reserve(count)

    def ledger(self) -> tuple[int, float]:
        return self._bucket.ledger()


def start_bucket(config: "IngestConfig") -> Any:
    """The actor, None without a limit on bytes. Needs an initialised Ray; it goes with its last handle."""
    if config.bytes_per_second is None:
        return None
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(_Bucket).options(runtime_env=runtime_env(), **options).remote(config.bytes_per_second)


def worker_meter(config: "IngestConfig", bucket: Any) -> "Meter | None":
    """The meter of one worker; None without limits."""
    from ingest.limits import Meter

    if bucket is None:
        return Meter(None) if config.open_files is not None else None
    import ray

    assert config.bytes_per_second is not None
    return Meter(lambda count: float(ray.get(bucket.reserve.remote(count))), config.bytes_per_second)


def ledger(bucket: Any) -> tuple[int, float]:
    """(bytes, seconds) that the workers were granted; (0, 0) without a limit or where the actor is gone."""
    if bucket is None:
        return 0, 0.0
    import ray

    try:
        count, seconds = ray.get(bucket.ledger.remote(), timeout=10)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return 0, 0.0
    return int(count), float(seconds)
