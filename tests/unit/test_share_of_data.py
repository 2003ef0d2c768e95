"""raycap/training/driver.py: what reading may take follows from the cluster; nobody is asked."""

import pytest

from raycap.config import TrainConfig
from raycap.training.driver import share_of_data


@pytest.mark.parametrize(
    ("num_workers", "cpus_per_worker", "cpus", "for_each"), [(2, 1, 4, 1), (8, 1, 96, 11), (8, 4, 96, 8), (3, 1, 8, 1)]
)
def test_readers_share_the_cpus_that_workers_leave(
    num_workers: int, cpus_per_worker: int, cpus: int, for_each: int
) -> None:
    config = TrainConfig(num_workers=num_workers, cpus_per_worker=cpus_per_worker, global_batch_size=64)
    resources = {"CPU": float(cpus), "object_store_memory": 48e9}
    num_cpus, store_bytes = share_of_data(config, resources)
    assert num_cpus == for_each
    assert num_workers * (cpus_per_worker + num_cpus) <= cpus
    assert num_workers * store_bytes <= 24e9
