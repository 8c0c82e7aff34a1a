# SPDX-License-Identifier: MIT
"""Predictions: the time of a step on a large server, and when to shard it.

The model of a float32 step is fitted to its time over that of the traffic twin in the same round,
which takes the load of the machine out:

    step = call + fork + tensors x tensor + max(twin, elements / (threads x rate))

where `fork` and more than one thread apply from 32,768 elements on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from reporting import data
from reporting.data import OURS, STEP_BYTES, TWIN, NotMeasuredError, Sections, ratio, times

FITTED = ("sizes", "many_tensors", "threads")
# Elements. Equal to smallest_shared in src/cpp/parallel/shared_pass.hpp.
SMALLEST_PARALLEL_STEP = 32_768
# Typical values of a current desktop: the seconds of a call, of fork and of a tensor, and the
# elements per second of a thread.
START = {"call": 1e-6, "fork": 2e-6, "tensor": 1e-7, "rate": 3e9}

# A hypothetical machine: 2 sockets with 12 channels of DDR5-4800 each (4.8e9 transfers of 8 bytes
# per second), of which programs reach 80 %, and a module of 64 GiB for each channel, of which 90 %
# are for parameters, gradients and moments.
CORES, CHANNELS, CHANNEL_BANDWIDTH, REACHED = 96, 24, 38.4e9, 0.8
SERVER_BANDWIDTH = CHANNELS * CHANNEL_BANDWIDTH * REACHED
USABLE_BYTES = 0.9 * CHANNELS * (64 << 30)
STATE_BYTES = 16  # of a parameter with its gradient and moments
# A reduce-scatter of gradients and an all-gather of parameters each move 4 bytes per parameter,
# times (N - 1) / N, out of every machine and into it. An assumption: they reach 90 %.
EXCHANGED_BYTES, NETWORK_REACHED = 8, 0.9


def samples_of(sections: Sections) -> pd.DataFrame:
    """Return the float32 steps: tensors, elements of all, threads, seconds of step and twin."""
    return pd.DataFrame(
        [
            {
                "case": row["case"], "tensors": row["tensors"],
                "elements": row["tensors"] * row["elements"], "threads": row["threads"],
                "twin": times(row)[TWIN].median(), "ratio": (1 / ratio(row, TWIN)).median(),
            }
            for section in FITTED
            for row in sections[section]["rows"]
            if {OURS, TWIN} <= row["seconds"].keys()
        ]
    )  # fmt: skip


def predicted(samples: pd.DataFrame, constants: Mapping[str, float]) -> pd.Series:
    """Return the predicted time of each step over that of its twin."""
    shared = samples["elements"] >= SMALLEST_PARALLEL_STEP
    threads = samples["threads"].where(shared, 1)
    computing = samples["elements"] / (threads * constants["rate"])
    extra = constants["call"] + constants["fork"] * (threads > 1)
    extra += constants["tensor"] * samples["tensors"]
    return (extra + np.maximum(samples["twin"], computing)) / samples["twin"]


def fit(samples: pd.DataFrame) -> dict[str, float]:
    """Return the constants that fit best, by least squares of the relative errors."""
    if len(samples) < len(START):
        raise NotMeasuredError(f"{len(samples)} steps are too few to fit {len(START)} constants")

    def errors(logarithms: Any) -> Any:
        constants = dict(zip(START, np.exp(logarithms), strict=True))
        return np.log(predicted(samples, constants) / samples["ratio"])

    found = least_squares(errors, np.log([*START.values()]))
    return dict(zip(START, map(float, np.exp(found.x)), strict=True))


def cost_model_part(sections: Sections) -> str:
    """Return the constants, their errors, and the predictions."""
    samples = samples_of(sections)
    constants = fit(samples)
    errors = predicted(samples, constants) / samples["ratio"] - 1
    worst = errors.abs().idxmax()
    per_parameter = STEP_BYTES / SERVER_BANDWIDTH
    computing = 1 / (CORES * constants["rate"]) / per_parameter
    server = [
        {
            "parameters": data.as_count(n), "memory with gradients": data.as_bytes(STATE_BYTES * n),
            "step": data.as_time(n * per_parameter),
            "step, all memory on one socket": data.as_time(2 * n * per_parameter),
        }
        for n in (10**9, 10**10, 10**11)
    ]  # fmt: skip
    network = 8e-9 * EXCHANGED_BYTES / per_parameter
    saved = {
        g: per_parameter / (per_parameter + EXCHANGED_BYTES / (g * 1e9 / 8 * NETWORK_REACHED))
        for g in (100, 400)
    }
    return f"""\
Fitted to {len(samples)} steps: a call {data.as_time(constants["call"])}, fork {data.as_time(constants["fork"])}, a tensor
{data.as_time(constants["tensor"])}, rate {data.digits(constants["rate"] / 1e9)} G elements/s. Half of the predictions are within \
{100 * errors.abs().median():.1f} %;
the worst is {samples["case"][worst]} ({100 * errors[worst]:+.0f} %).

{data.markdown(server)}

Computing alone would take {100 * computing:.0f} % of these times.

- **One machine computes the gradients**: sharding the step pays only on a network faster than
  {EXCHANGED_BYTES} / {STEP_BYTES} of the memory's bandwidth: {data.digits(network)} Gbit/s for this server.
- **The machines train copies of the model**: sharding adds no traffic to their exchange of
  gradients, so it pays from two machines on. It saves at most {100 * saved[100]:.0f} % at 100 Gbit/s and
  {100 * saved[400]:.0f} % at 400 Gbit/s of the combined time of exchange and step.
- **Memory**: sharding pays from {USABLE_BYTES / STATE_BYTES / 1e9:.0f}B parameters on, which fill such a server.
  Sharding only the moments suffices up to {USABLE_BYTES / 8e9:.0f}B."""
