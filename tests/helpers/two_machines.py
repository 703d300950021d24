"""A program: a Ray cluster of two nodes, one of which is lost while it works; prints what came out."""

import hashlib
import os

import worker_tasks
from planish.runtime.ray_workers import RayWorkers
from ray.cluster_utils import Cluster
from worker_cases import solved


def digest(parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    workers = RayWorkers(cluster.address)
    print("count", workers.count)
    print("gptq", digest(solved("gptq", workers)))

    def items():
        for number in range(12):
            if number == 4:
                cluster.remove_node(second, allow_graceful=False)
            yield number

    print("survived", list(workers.map(worker_tasks.scaled, 3, items())))
    workers.close()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.path.dirname(__file__) + os.pathsep + os.environ.get("PYTHONPATH", "")
    main()
