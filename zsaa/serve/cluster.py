"""The house on Ray Serve, which brings replicas, autoscaling, several nodes and HTTP.

Each replica is a whole server: its models, its queues, its controllers. Ray's router sends a request to the emptier of
two replicas; /metrics and /live, asked of one, tell of all.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict

from ray import serve

from zsaa.serve import app as http
from zsaa.serve.furnish import Settings, furnish
from zsaa.serve.lane import settle

NAME = "zsaa"


class Replica:
    """One server. Ray makes it, and asks it for its application."""

    def __init__(self, content: dict):
        self.settings = Settings(**{**content, "hosts": tuple(content["hosts"])})
        self.name = serve.get_replica_context().replica_id.unique_id
        self.house = furnish(self.settings, self.name)
        settle()

    def __serve_build_asgi_app__(self):
        settings = self.settings
        return http.build(self.house, settings.key, settings.hosts, settings.max_body, self.gather)

    def check_health(self) -> None:
        """Asked by Ray every few seconds, which replaces a replica whose model has ended."""
        if not self.house.alive():
            raise RuntimeError("the process of the models has ended")

    def snapshot(self) -> tuple[str, str, dict]:
        return self.house.snapshot()

    async def gather(self) -> list[tuple[str, str, dict]]:
        """The snapshots of all replicas; of this one alone while the others cannot be reached."""
        asked = serve.get_deployment_handle(NAME, NAME).broadcast("snapshot")
        try:
            found = await asyncio.wait_for(asked.results_async(return_exceptions=True), 3)
        except Exception as error:  # a replica that just died must not take the numbers of the others with it
            http.LOG.warning("replica %s tells of itself alone: %s", self.name, type(error).__name__)
            found = []
        return [one for one in found if not isinstance(one, BaseException)] or [self.snapshot()]


def application(settings: Settings, replicas: int = 1, most: int | None = None, cpus: float = 1.0, gpus: float = 0.0):
    """What `serve.run` takes. replicas: that many; with `most`, from that many to `most`, as many as the load needs."""
    room = settings.max_jobs * 2 + 32  # more than a lane lets in, so that it is the lane that refuses
    scale: dict = {"num_replicas": replicas}
    if most is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": most,
                "target_ongoing_requests": 2 * settings.batch,
            }
        }
    threads = settings.threads or max(1, (os.cpu_count() or 1) // (most or replicas))
    content = asdict(settings) | {"threads": threads}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        max_ongoing_requests=room,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=5,
        **scale,
    )
    return deployment.bind(content)
