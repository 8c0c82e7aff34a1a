# SPDX-License-Identifier: MIT
"""One rank of the distributed checks, started by tests/torch/test_local.py.

    python distributed_worker.py RANK DIRECTORY

RANKS of these processes are started once for all checks, because starting one takes longer than a
check. For each check they form a process group of its own through files in the directory, so a
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

RANKS = 2
# For all checks together. A rank that takes longer prints its stack and exits.
TIME_LIMIT_S = 240
# For one exchange between ranks.
EXCHANGE_LIMIT_S = 120


def outcome_of(name: str, rank: int, directory: Path) -> str | None:
    """Run a check and return the traceback of its exception, if any."""
    # One store serves one group, so the file is named after the check.
    store = dist.FileStore(str(directory / f"store-{name}"), RANKS)
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=EXCHANGE_LIMIT_S),
        )
        # No rank may fail and leave before the others have reached it.
        dist.barrier()
        CHECKS[name](rank, directory)
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
    for name in CHECKS:
        outcomes[name] = outcome_of(name, int(rank), Path(directory))
        (Path(directory) / f"outcomes-{rank}.json").write_text(json.dumps(outcomes), "utf-8")
    # torch threads that outlive their process group sometimes abort the interpreter at exit.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
