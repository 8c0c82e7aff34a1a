# SPDX-License-Identifier: MIT
"""Predictions of the cost model for a large server, and for sharding over several servers.

Sharding is as in ZeRO (Rajbhandari et al., arXiv:1910.02054): each of N machines keeps the moments
of 1 / N of the parameters, and steps that shard. A reduce-scatter distributes the gradients, and an
all-gather distributes the stepped parameters. Each of the two sends (N - 1) / N times 4 bytes per
parameter out of every machine, and as many into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_model import STATE_BYTES, CostModel
from rows import STEP_BYTES

# A float32 gradient or parameter, on the network or in memory.
VALUE_BYTES = 4


@dataclass(frozen=True)
class Server:
    """A hypothetical machine. All values are assumed; only the speed of a core is measured."""

    sockets: int = 2
    cores: int = 96  # of all sockets
    channels: int = 12  # per socket
    # DDR5-4800: 4.8e9 transfers of 8 bytes per second.
    channel_bandwidth: float = 38.4e9
    # Fraction of that bandwidth that programs reach. The best programs measured come near it.
    achieved: float = 0.8
    # One module of 64 GiB per channel.
    module_bytes: int = 64 << 30
    # Fraction of the memory for parameters, gradients and moments.
    usable: float = 0.9

    @property
    def bandwidth(self) -> float:
        """Bytes per second of all channels, if each core uses those of its own socket."""
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
    """The network between the machines. Each has one full-duplex port."""

    gigabits: float
    # Fraction of the bandwidth that a collective operation reaches: an assumption.
    achieved: float = 0.9

    @property
    def bandwidth(self) -> float:
        """Bytes per second in each direction."""
        return self.gigabits * 1e9 / 8 * self.achieved


def compute_seconds(model: CostModel, cores: int) -> float:
    """Return the seconds per element of computation on this many cores of the measured kind."""
    return 1 / (cores * model.rate)


def memory_seconds(model: CostModel, bandwidth: float, cores: int) -> float:
    """Return the seconds per element of memory traffic.

    The bandwidth of each core is limited to the measured one.
    """
    return STEP_BYTES["float32"] / min(bandwidth, cores * model.core_bandwidth)


def seconds_per_parameter(model: CostModel, server: Server) -> float:
    """Return the seconds per parameter of a step, if threads use the memory of their own socket.

    From 1B parameters on, calls, threads and caches account for less than a thousandth of the time.
    """
    return max(
        compute_seconds(model, server.cores), memory_seconds(model, server.bandwidth, server.cores)
    )


def seconds_from_one_socket(model: CostModel, server: Server) -> float:
    """Return the seconds per parameter of a step, if all memory is on one socket.

    That happens if one thread touches all memory first. The result is a lower bound: half of the
    cores also have to use the link between the sockets.
    """
    bandwidth = server.bandwidth / server.sockets
    return max(compute_seconds(model, server.cores), memory_seconds(model, bandwidth, server.cores))


def saved_by_sharding(step: float, machines: int) -> float:
    """Return the seconds that sharding a step over this many machines saves."""
    return step * (1 - 1 / machines)


def traffic_seconds(network: Network, machines: int) -> float:
    """Return the seconds per parameter of a reduce-scatter and an all-gather, back-to-back."""
    return 2 * VALUE_BYTES * (1 - 1 / machines) / network.bandwidth


def network_that_pays(step: float) -> float:
    """Return the bytes per second above which sharding pays if all of its traffic is additional.

    The time saved and the time added both have the factor (N - 1) / N, so the number of machines
    cancels. The condition is 8 bytes / bandwidth < seconds per parameter.
    """
    return 2 * VALUE_BYTES / step


def most_saved_of_an_exchange(step: float, network: Network) -> float:
    """Return the limit, for many machines, of the fraction of (step + gradient exchange) saved.

    Machines that train copies of a model exchange gradients anyway, with a reduce-scatter and an
    all-gather. A sharded step uses the same two operations, the second for parameters, and so adds
    no traffic.
    """
    exchange = 2 * VALUE_BYTES / network.bandwidth
    return step / (step + exchange)


def machines_for_memory(parameters: float, server: Server, *, all_sharded: bool) -> int:
    """Return the least number of machines whose memory suffices.

    With `all_sharded`, everything is sharded (ZeRO 3). Otherwise each machine has all parameters
    and gradients, and only the moments are sharded (ZeRO 1).
    """
    state = STATE_BYTES * parameters
    whole = 0.0 if all_sharded else 2 * VALUE_BYTES * parameters
    if whole >= server.usable_bytes:
        raise ValueError(
            f"parameters must fit with their gradients on one server. Received: {parameters:g}"
        )
    return max(1, math.ceil((state - whole) / (server.usable_bytes - whole)))
