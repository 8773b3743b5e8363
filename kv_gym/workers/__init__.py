"""Many calls of one function, shared out: to this process, to processes of this machine, or to a Ray cluster.

    with WorkerPool(make_recorder, lambda: (model, settings), workers=4) as pool:
        for task, result in pool.run(tasks):
            ...

A worker calls ``make_recorder(model, settings)`` once, before its first task, and then what that returned with one task
after the other. A worker that dies is replaced and its task tried again. Every worker computes with one thread: sums
over several threads are rounded otherwise, and so results depend neither on the number of workers nor on the engine.
"""

from kv_gym.workers.engine import MOST_TRIES
from kv_gym.workers.pool import WorkerPool
from kv_gym.workers.ray_cluster import RayAddress

__all__ = ["MOST_TRIES", "RayAddress", "WorkerPool"]
