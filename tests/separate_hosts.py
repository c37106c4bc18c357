"""Hosts on one machine: network namespaces with a switch between them, and what runs in them."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace: interfaces, addresses and ports of its own. It sees this machine's files
    and processes."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command that runs another one there."""
        return ["ip", "netns", "exec", self.name, *command]

    def processes(self) -> list[psutil.Process]:
        """All that run there now, daemons too."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True
        )
        found = []
        for number in listed.stdout.split():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                found.append(psutil.Process(int(number)))
        return found


@dataclass(frozen=True)
class Network:
    """Hosts at a switch, which is on the first."""

    hosts: list[Host]

    def cut_off(self, number: int) -> None:
        """Take the cable of a host but the first out: what runs there goes on by itself."""
        _ip("-n", self.hosts[0].name, "link", "set", f"port{number}", "down")


@contextlib.contextmanager
def network(size: int) -> Iterator[Network]:
    """Connect so many new hosts; at the end all that runs there is killed.

    Nothing of it is seen from outside but the hosts' names, so other networks may be there, and
    ports are free. Skips the test where the kernel refuses any of it.
    """
    with contextlib.ExitStack() as parts:
        try:
            _clear_up()
            hosts = [
                parts.enter_context(_host(f"atelier-{os.getpid()}-{number}", f"10.77.0.{number}"))
                for number in range(1, size + 1)
            ]
            first, *others = hosts
            _ip("-n", first.name, "link", "add", "switch", "type", "bridge")
        except FileNotFoundError:
            pytest.skip("there is no `ip` (iproute2), which makes network namespaces")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are refused: {error.stderr.strip()}")
        _connect(first, "switch")
        for number, other in enumerate(others, start=1):
            cable = ("type", "veth", "peer", "name", "eth0", "netns", other.name)
            _ip("-n", first.name, "link", "add", f"port{number}", *cable)
            _ip("-n", first.name, "link", "set", f"port{number}", "master", "switch", "up")
            _connect(other, "eth0")
        yield Network(hosts)


@contextlib.contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    _ip("netns", "add", name)
    host = Host(name, address)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield host
    finally:
        _remove(host)


def _remove(host: Host) -> None:
    while processes := host.processes():
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)
    _ip("netns", "delete", host.name)


def _clear_up() -> None:
    """Remove what earlier tests left that were killed."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = re.fullmatch(r"atelier-(\d+)-\d+", name)
        if owner and (int(owner[1]) == os.getpid() or not psutil.pid_exists(int(owner[1]))):
            _remove(Host(name, ""))


def _connect(host: Host, device: str) -> None:
    _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", device)
    _ip("-n", host.name, "link", "set", device, "up")
    # It leads nowhere; but programs find a machine's address by the route that they would take.
    _ip("-n", host.name, "route", "add", "default", "dev", device)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
