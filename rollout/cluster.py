"""The Ray cluster of a run: started on this machine for its time, or joined."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import RunError


@dataclass(frozen=True)
class Placement:
    """How many actors of one kind there are, and what each of them takes.

    `section` is that of the recipe (`rollout`, `decode`, `rewards`). A GPU may be shared (0.5);
    `resource` names a Ray resource of which each takes one. `timeout_s` is how long one call may
    take before an actor counts as hung.
    """

    section: str
    workers: int
    cpus: float = 1
    gpus: float = 0
    resource: str | None = None
    timeout_s: float = 600

    @property
    def threads(self) -> int:
        """Threads that each computes with."""
        return max(1, int(self.cpus))

    @property
    def each(self) -> dict[str, float]:
        """What one takes, by the names under which Ray counts it."""
        named = {self.resource: 1.0} if self.resource else {}
        return {"CPU": self.cpus, "GPU": self.gpus, **named}


_KEYS = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker"}
"""What a worker takes of each; of anything else it takes one, by name (`resource`)."""


@contextmanager
def ray_cluster(address: str | None, placements: Sequence[Placement]) -> Iterator[None]:
    """Join the cluster at `address` ("auto": the one of this machine); None starts one here.

    One that this process is connected to already is used as it is. Raises RunError where Ray would
    wait for room without end.
    """
    import ray

    connects = not ray.is_initialized()
    if connects:
        _connect(address, placements)
    try:
        check_room(placements)
        yield
    finally:
        if connects:
            ray.shutdown()


def check_room(placements: Sequence[Placement]) -> None:
    """Raise RunError unless the cluster has free what all of them need."""
    import ray

    free = ray.available_resources()
    for resource, needed in _needed(placements).items():
        there = free.get(resource, 0.0)
        if needed > there:
            taken = [(p, p.each[resource]) for p in placements if p.each.get(resource)]
            told = ", ".join(f"{p.section}.workers: {p.workers} x {each:g}" for p, each in taken)
            name = _KEYS.get(resource, "resource")
            keys = " or ".join(f"{p.section}.ray.{name}" for p, _ in taken)
            raise RunError(
                f"the workers need {needed:g} {resource} ({told}), and the Ray cluster has "
                f"{there:g} free.\n"
                f"    Fix: use fewer workers, or change {keys}; to resume, in recipe.yaml in the "
                "run's folder."
            )


def _connect(address: str | None, placements: Sequence[Placement]) -> None:
    import ray

    if address is not None:
        try:
            _check_port(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
            if "AuthenticationError" in f"{error!r} {error.__cause__}":
                raise RunError(
                    f"rollout.ray.address: the Ray cluster at {address} asks for its token, and "
                    "this process has none or another.\n"
                    "    Fix: copy ~/.ray/auth_token from the cluster's first machine, and `export "
                    "RAY_AUTH_MODE=token`."
                ) from error
            raise RunError(
                f"rollout.ray.address: no Ray cluster answers at {address} ({error}).\n"
                "    Fix: start one with `ray start --head` and write auto or HOST:PORT, or set "
                "the key to null."
            ) from error
        return
    # Ray counts CPUs to place actors; a small machine must still hold all of them.
    needed = _needed(placements)
    cpus, _ = needed.pop("CPU"), needed.pop("GPU")
    ray.init(
        address="local",  # by default Ray would join whatever cluster runs on this machine
        num_cpus=max(os.cpu_count() or 1, int(-(-cpus // 1))),
        resources=needed,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        # Ray's default, 15, is for work in the background: beside another program workers starve.
        _system_config={"worker_niceness": 0},
    )


def _check_port(address: str) -> None:
    """Raise ConnectionError or ValueError where nothing listens: Ray would try for minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    found = None if "://" in address else canonicalize_bootstrap_address(address)
    if found is not None:
        host, _, port = found.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(error) from error


def _needed(placements: Sequence[Placement]) -> dict[str, float]:
    needed = {"CPU": 0.0, "GPU": 0.0}
    for placement in placements:
        for resource, each in placement.each.items():
            # Ray counts ten-thousandths; sums of floats such as 3 x 0.1 are off by less.
            needed[resource] = round(needed.get(resource, 0.0) + placement.workers * each, 4)
    return needed
