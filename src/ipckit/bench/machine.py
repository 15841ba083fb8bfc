"""The conditions that a figure holds under: the machine, the system, the versions, and what else was going on."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..errors import BadOption
from .measure import timer_cost

#: Distribution → what readers call it, for the libraries that we measure against.
_LIBRARIES = ("pyzmq", "nats-py", "redis", "hiredis", "grpcio", "posix_ipc")


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures depend on.

    Attributes:
        cores: that this process may use.
        timer: nanoseconds that one look at the clock costs.
        load: the one-minute average at the start.
    """

    processor: str
    cores: int
    memory: int
    system: str
    python: str
    ipckit: str
    libraries: dict[str, str]
    timer: int
    load: float
    virtual: str = ""
    servers: dict[str, str] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Something else ran here when we began."""
        return self.load > 0.3 * self.cores

    def same_as(self, other: Machine) -> list[str]:
        """What differs, of that which makes figures incomparable."""
        names = ("processor", "cores", "system", "python", "virtual")
        return [
            f"{name}: {getattr(other, name)} → {getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def facts() -> Machine:
    """Of the machine that we are on. Reads; changes nothing; never fails for what it cannot find."""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    if "pyzmq" in libraries:
        import zmq

        libraries["libzmq"] = zmq.zmq_version()
    return Machine(
        processor=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=len(allowed_cpus()),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}{_without_gil()}",
        ipckit=__version__,
        libraries=libraries,
        timer=timer_cost(),
        load=os.getloadavg()[0],
        virtual="virtual machine" if "hypervisor" in _cpuinfo("flags").split() else "",
    )


def _without_gil() -> str:
    return "" if getattr(sys, "_is_gil_enabled", lambda: True)() else " free-threaded"


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def allowed_cpus() -> list[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def choose_cpus(asked: str | None = None) -> tuple[int, int]:
    """One for the driving end, one for the echo: two different cores of one package, where there are two.

    `asked`: "A,B" from the command line. Raises BadOption for CPUs that we may not use.
    """
    allowed = allowed_cpus()
    if asked is not None:
        try:
            first, second = (int(part) for part in asked.split(","))
        except ValueError:
            raise BadOption(f"--cpus takes two numbers, such as 0,1, not {asked!r}") from None
        for cpu in (first, second):
            if cpu not in allowed:
                raise BadOption(f"there is no CPU {cpu} for us here", hint=f"we may use {', '.join(map(str, allowed))}")
        return first, second
    first = allowed[0]
    for second in allowed[1:]:
        if _place(second)[0] == _place(first)[0] and _place(second)[1] != _place(first)[1]:
            return first, second
    return (first, allowed[1]) if len(allowed) > 1 else (first, first)


def _place(cpu: int) -> tuple[str, str]:
    """(package, core): two hardware threads of one core share both."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)
