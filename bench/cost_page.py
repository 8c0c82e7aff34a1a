# SPDX-License-Identifier: MIT
"""The documentation of the cost model in Markdown. Every number in it is computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cost_model import STATE_BYTES, CostModel, Fit
from rows import (
    OURS,
    STEP_BYTES,
    all_elements,
    as_bytes,
    as_count,
    as_error,
    as_time,
    digits,
    median,
    table,
)
from sharding import (
    VALUE_BYTES,
    Network,
    Server,
    compute_seconds,
    machines_for_memory,
    most_saved_of_an_exchange,
    network_that_pays,
    saved_by_sharding,
    seconds_from_one_socket,
    seconds_per_parameter,
    traffic_seconds,
)

PARAMETERS = (1e9, 1e10, 1e11)
MACHINES = (2, 4, 8, 32)
NETWORKS = (Network(100), Network(400))

INTRODUCTION = (
    "The time of a float32 step, with constants fitted by least squares to the relative errors of "
    "{} measurements (medians, from Python). `fork` applies only with several threads, which a "
    "small step does not use:"
)
FORMULA = f"""\
```text
seconds = call + fork + tensors x (f x cached tensor + (1 - f) x tensor from memory)
        + elements x (f x compute + (1 - f) x max(compute, {STEP_BYTES["float32"]} B / bandwidth))

f         = min(1, cache / ({STATE_BYTES} B x elements))    the fraction that stays in cache between steps
compute   = 1 / (threads x rate)
bandwidth = min(threads x bandwidth of a core, bandwidth of the memory)
```"""


def cost_model_part(fit: Fit, threads: int, large: Mapping[str, Any] | None) -> str:
    """Return the formula, constants, residuals and predictions, without the plot."""
    return "\n\n".join(
        [
            INTRODUCTION.format(len(fit.samples)),
            FORMULA,
            constants_table(fit),
            quality(fit),
            *([] if large is None else held_out(fit.model, threads, large)),
            residuals_table(fit),
            "### Predicted: a large server",
            *server_part(fit.model, Server()),
            "### Predicted: many machines",
            *sharding_part(fit.model, threads, Server()),
        ]
    )


def constants_table(fit: Fit) -> str:
    """Return the table of constants, in readable units, with their standard errors."""
    model = fit.model
    shown = {
        "call": ("a call", as_time(model.call)),
        "fork": ("fork: starting and joining the threads", as_time(model.fork)),
        "tensor_cached": ("a cached tensor", as_time(model.tensor_cached)),
        "tensor_memory": ("a tensor from memory", as_time(model.tensor_memory)),
        "rate": ("rate of a thread", f"{digits(model.rate / 1e9)} G elements/s"),
        "core_bandwidth": ("bandwidth of a core", f"{as_bytes(model.core_bandwidth)}/s"),
        "memory_bandwidth": ("bandwidth of the memory", f"{as_bytes(model.memory_bandwidth)}/s"),
        "cache": ("cache", as_bytes(model.cache)),
    }
    rows = []
    for name, (words, value) in shown.items():
        error = fit.uncertainty[name]
        known = f"{100 * error:.0f} %" if math.isfinite(error) else "not determined by these rows"
        rows.append([words, value if math.isfinite(error) else "—", known])
    return table(["constant", "value", "standard error"], rows)


def quality(fit: Fit) -> str:
    """Return a summary of the residuals."""
    residuals = [abs(r) for r in fit.residuals()]
    within = sum(r <= 0.1 for r in residuals)
    worst = max(range(len(residuals)), key=residuals.__getitem__)
    return (
        f"Half of the predictions are within {100 * median(residuals):.1f} % of the measurement, {within} of "
        f"{len(residuals)} within 10 %. The worst is {fit.samples[worst].case} "
        f"({as_error(fit.residuals()[worst])})."
    )


def held_out(model: CostModel, threads: int, large: Mapping[str, Any]) -> list[str]:
    """Compare the model with the largest measured step, which is not part of the fit."""
    rows = [row for row in large["rows"] if OURS in row["seconds"]]
    if not rows:
        return []
    row = max(rows, key=all_elements)
    elements = all_elements(row)
    predicted = model.seconds(elements, tensors=row.get("tensors", 1), threads=threads)
    measured = median(row["seconds"][OURS])
    text = (
        f"A held-out step, {as_count(elements)} parameters: predicted "
        f"{as_time(predicted)}, measured {as_time(measured)} "
        f"({as_error(predicted / measured - 1)})."
    )
    return [text]


def residuals_table(fit: Fit) -> str:
    """Return the table of all measurements and their predictions."""
    rows = [
        [
            sample.section,
            sample.case,
            f"{sample.threads}",
            as_time(sample.seconds),
            as_time(sample.seconds * (1 + residual)),
            as_error(residual),
        ]
        for sample, residual in zip(fit.samples, fit.residuals(), strict=True)
    ]
    return (
        "<details><summary>Every measurement and its prediction</summary>\n\n"
        + table(["section", "case", "threads", "measured", "predicted", "error"], rows)
        + "\n\n</details>"
    )


def server_part(model: CostModel, server: Server) -> list[str]:
    """Return the assumptions and predictions for one large server."""
    per_parameter = seconds_per_parameter(model, server)
    compute = compute_seconds(model, server.cores)
    one_socket = seconds_from_one_socket(model, server)
    bound = (
        "memory is the limit: computing alone would take "
        f"{100 * compute / per_parameter:.0f} % of the time"
        if per_parameter > compute
        else "computing is the limit, and more bandwidth would not help"
    )
    assumptions = (
        f"Assumptions: {server.sockets} sockets with {server.cores} cores in total, each as fast "
        f"as one here. Each socket has {server.channels} channels of "
        f"{digits(server.channel_bandwidth / 1e9)} GB/s (DDR5-4800), of which programs reach "
        f"{100 * server.achieved:.0f} %: {as_bytes(server.bandwidth)}/s in total. Each channel has "
        f"a module of {server.module_bytes >> 30} GiB, {as_bytes(server.memory_bytes)} in total, "
        f"{100 * server.usable:.0f} % of it for parameters, gradients and moments. Threads are "
        "pinned, and each part of the arrays is in the memory of the socket that steps it. Then "
        f"{bound}."
    )
    rows = [
        [
            as_count(n),
            as_bytes(STATE_BYTES * n),
            as_time(n * per_parameter),
            as_time(n * one_socket),
            f"{machines_for_memory(n, server, all_sharded=False)}",
        ]
        for n in PARAMETERS
    ]
    header = ["parameters", "memory with gradients", "step", "step, all memory on one socket"]
    remarks = (
        f"A step moves {STEP_BYTES['float32']} bytes per parameter. A parameter with its gradient "
        f"and moments occupies {STATE_BYTES}. If one thread writes the arrays first, all memory is "
        "on one socket; those times are lower bounds. The number of servers assumes parameters "
        "and gradients whole on each server, and sharded moments."
    )
    return [assumptions, table([*header, "servers needed for memory"], rows), remarks]


def sharding_part(model: CostModel, threads: int, server: Server) -> list[str]:
    """Return when it pays to shard the step over several machines."""
    step = seconds_per_parameter(model, server)
    header = ["machines", "step of 1B parameters", "saved by sharding"]
    header += [f"traffic at {network.gigabits:g} Gbit/s" for network in NETWORKS]
    rows = [
        [
            f"{n}",
            as_time(1e9 * step / n),
            as_time(1e9 * saved_by_sharding(step, n)),
            *(as_time(1e9 * traffic_seconds(network, n)) for network in NETWORKS),
        ]
        for n in MACHINES
    ]
    traffic = (
        "Each of N machines steps 1 / N of the parameters. That takes a reduce-scatter of the "
        "gradients and an all-gather of the parameters. Each moves "
        f"{VALUE_BYTES} B x (N - 1) / N per parameter out of and into every machine, at "
        f"{100 * NETWORKS[0].achieved:.0f} % of the network's speed and without overlap. All times "
        "are proportional to the number of parameters."
    )
    return [
        traffic,
        table(header, rows),
        one_source_of_gradients(model, threads, step),
        copies_of_the_model(step),
        for_memory(server),
    ]


def one_source_of_gradients(model: CostModel, threads: int, step: float) -> str:
    """Say when sharding pays if all of its traffic is additional."""
    here = model.seconds(10**9, threads=threads) / 1e9
    fast = [network for network in NETWORKS if network.bandwidth >= network_that_pays(step)]
    speeds = " and ".join(f"{network.gigabits:g}" for network in fast or NETWORKS)
    verdict = f"It pays at {speeds} Gbit/s" if fast else f"It does not pay at {speeds} Gbit/s"
    return (
        "**One machine computes the gradients.** Then sharding adds all of that traffic. Savings "
        "and traffic are both proportional to (N - 1) / N, so sharding pays only if the network "
        f"reaches more than {2 * VALUE_BYTES} / {STEP_BYTES['float32']} of the memory's "
        f"bandwidth: {digits(as_gigabits(network_that_pays(step)))} Gbit/s for this server. "
        f"{verdict}, whatever the number of machines and parameters. (For the machine measured "
        f"here: {digits(as_gigabits(network_that_pays(here)))} Gbit/s.)"
    )


def copies_of_the_model(step: float) -> str:
    """Say when sharding pays if it adds no traffic."""
    shares = " and ".join(
        f"{100 * most_saved_of_an_exchange(step, network):.0f} % at {network.gigabits:g} Gbit/s"
        for network in NETWORKS
    )
    return (
        f"**The machines train copies of the model.** They exchange {2 * VALUE_BYTES} B per "
        "parameter anyway, to average the gradients. Sharding replaces the second half of that "
        "exchange with the all-gather of the parameters and adds no traffic, so it pays from two "
        f"machines on. It saves at most {shares} of the combined time of exchange and step."
    )


def for_memory(server: Server) -> str:
    """Say when sharding pays because one machine has too little memory."""
    full = server.usable_bytes / STATE_BYTES
    most = server.usable_bytes / (2 * VALUE_BYTES)
    servers = machines_for_memory(PARAMETERS[-1], server, all_sharded=True)
    return (
        f"**Memory.** Sharding pays from {full / 1e9:.0f}B parameters on, where {STATE_BYTES} B per "
        f"parameter fill the usable {as_bytes(server.usable_bytes)} of one such server. Sharding "
        f"only the moments suffices up to {most / 1e9:.0f}B. With parameters and gradients sharded "
        f"too, {as_count(PARAMETERS[-1])} need {servers} servers, and every further "
        f"{full / 1e9:.0f}B one more."
    )


def as_gigabits(bandwidth: float) -> float:
    """Convert bytes per second to Gbit/s."""
    return 8e-9 * bandwidth
