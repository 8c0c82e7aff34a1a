# SPDX-License-Identifier: MIT
"""One rank of the distributed checks, started by tests/torch/test_local.py.

    python distributed_worker.py RANK DIRECTORY

RANKS of these processes are started once for all checks, because starting one takes longer than a
check. The ranks of a check form their own process group through files in the directory, so a
failing check does not affect the next ones. The outcome of each check is written to
DIRECTORY/outcomes-RANK.json.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from distributed_checks import CHECKS

dist: Any = torch.distributed


RANKS = max(check.ranks for check in CHECKS.values())
# For all checks together. A rank that takes longer prints its stack and exits.
TIME_LIMIT_S = 500
# For one exchange between ranks. The third rank also waits this long while the others run the
# checks that do not need it.
EXCHANGE_LIMIT_S = 400


def outcome_of(name: str, rank: int, directory: Path) -> str | None:
    """Run a check and return the traceback of its exception, if any."""
    ranks, run = CHECKS[name]
    # One store serves one group, so the file is named after the check.
    store = dist.FileStore(str(directory / f"store-{name}"), ranks)
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=EXCHANGE_LIMIT_S),
        )
        # No rank may fail and leave before the others have reached it.
        dist.barrier()
        run(rank, directory)
    except BaseException:  # noqa: BLE001 - CheckpointException is a BaseException
        return traceback.format_exc()
    finally:
        # Closing the connections releases the ranks that wait for one that has failed.
        if dist.is_initialized():
            dist.destroy_process_group()
    return None


def main(arguments: Iterable[str]) -> None:
    rank, directory = arguments
    faulthandler.dump_traceback_later(TIME_LIMIT_S, exit=True)
    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        if int(rank) < check.ranks:
            outcomes[name] = outcome_of(name, int(rank), Path(directory))
            (Path(directory) / f"outcomes-{rank}.json").write_text(json.dumps(outcomes), "utf-8")
    # torch threads that outlive their process group sometimes abort the interpreter at exit.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
