# SPDX-License-Identifier: MIT
"""What the cost model predicts for a large server, and for many of them that share the work.

Sharding as ZeRO has it (Rajbhandari et al., arXiv:1910.02054): each of N machines keeps the moments of one part in N of the
parameters, and steps that part. Gradients come to it by a reduce-scatter, stepped parameters go to all by an all-gather; each
of the two sends (N - 1) / N times 4 bytes a parameter out of every machine and as many into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_model import STATE_BYTES, CostModel
from rows import STEP_BYTES

# Of a float32 gradient, or of a parameter, on the network or in memory.
VALUE_BYTES = 4


@dataclass(frozen=True)
class Server:
    """A machine on paper. All of it is assumed, but the speed of a core, which is a measured one."""

    sockets: int = 2
    cores: int = 96  # of all sockets
    channels: int = 12  # a socket
    # DDR5-4800: 4.8e9 transfers of 8 bytes a second.
    channel_bandwidth: float = 38.4e9
    # What programs reach of that; the measured share of the best programs is near this.
    achieved: float = 0.8
    # One module of 64 GiB a channel.
    module_bytes: int = 64 << 30
    # Of the memory, for parameters, gradients and moments; the rest is for everything else.
    usable: float = 0.9

    @property
    def bandwidth(self) -> float:
        """Bytes a second of all channels, each core using those of its own socket."""
        return self.sockets * self.channels * self.channel_bandwidth * self.achieved

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory."""
        return self.sockets * self.channels * self.module_bytes

    @property
    def usable_bytes(self) -> float:
        """Bytes for parameters, gradients and moments."""
        return self.usable * self.memory_bytes


@dataclass(frozen=True)
class Network:
    """What connects the machines, each of them by one port that sends and receives at once."""

    gigabits: float
    # What a collective operation reaches of it: assumed.
    achieved: float = 0.9

    @property
    def bandwidth(self) -> float:
        """Bytes a second in each direction."""
        return self.gigabits * 1e9 / 8 * self.achieved


def compute_seconds(model: CostModel, cores: int) -> float:
    """Return the seconds an element that computing takes on so many cores like the measured ones."""
    return 1 / (cores * model.rate)


def memory_seconds(model: CostModel, bandwidth: float, cores: int) -> float:
    """Return the seconds an element that memory takes, where the cores cannot ask for more than they do here."""
    return STEP_BYTES["float32"] / min(bandwidth, cores * model.core_bandwidth)


def seconds_per_parameter(model: CostModel, server: Server) -> float:
    """Return the seconds a parameter of a step, with every thread's part in its own socket's memory.

    From 1B parameters on, calls, threads and caches are less than a thousandth of the whole.
    """
    return max(
        compute_seconds(model, server.cores), memory_seconds(model, server.bandwidth, server.cores)
    )


def seconds_from_one_socket(model: CostModel, server: Server) -> float:
    """Return the same where one thread touched all memory first: the channels of one socket serve all cores.

    A lower bound, since half of the cores also have to fetch it across the link between the sockets.
    """
    bandwidth = server.bandwidth / server.sockets
    return max(compute_seconds(model, server.cores), memory_seconds(model, bandwidth, server.cores))


def saved_by_sharding(step: float, machines: int) -> float:
    """Return the seconds that dividing a step by so many machines saves."""
    return step * (1 - 1 / machines)


def traffic_seconds(network: Network, machines: int) -> float:
    """Return the seconds a parameter of a reduce-scatter and an all-gather, one after the other."""
    return 2 * VALUE_BYTES * (1 - 1 / machines) / network.bandwidth


def network_that_pays(step: float) -> float:
    """Return the bytes a second above which sharding pays that adds all its traffic.

    What is saved and what is added have the same factor (N - 1) / N, so the number of machines drops out:
    8 bytes / bandwidth < seconds a parameter.
    """
    return 2 * VALUE_BYTES / step


def most_saved_of_an_exchange(step: float, network: Network) -> float:
    """Return the share of (step + exchange of gradients) that any number of machines can save.

    Machines that train copies of a model exchange gradients anyway, by a reduce-scatter and an all-gather. A sharded step
    does the same two, the second with parameters, and so adds no traffic.
    """
    exchange = 2 * VALUE_BYTES / network.bandwidth
    return step / (step + exchange)


def machines_for_memory(parameters: float, server: Server, *, all_sharded: bool) -> int:
    """Return how few machines hold the step: parameters and gradients on each (ZeRO 1) or everything divided (ZeRO 3)."""
    state = STATE_BYTES * parameters
    whole = 0.0 if all_sharded else 2 * VALUE_BYTES * parameters
    if whole >= server.usable_bytes:
        raise ValueError(
            f"parameters must fit with their gradients on one server. Received: {parameters:g}"
        )
    return max(1, math.ceil((state - whole) / (server.usable_bytes - whole)))
