# SPDX-License-Identifier: MIT
"""One rank of the checks in several processes; test_torch_distributed.py starts it.

    python distributed_worker.py RANK DIRECTORY

RANKS of these are started once, for all checks, since starting one takes longer than a check. The
ranks of a check form a process group for it alone, by files in the directory: one that fails leaves
the next ones as they are. What became of each check is written to DIRECTORY/outcomes-RANK.json.
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
# Of all checks together; a rank that takes longer prints where it is, and ends.
TIME_LIMIT_S = 150
# Of one exchange between ranks; the third also waits so long for the checks without it.
EXCHANGE_LIMIT_S = 60


def outcome_of(name: str, rank: int, directory: Path) -> str | None:
    """Run a check; the traceback of what it raised."""
    ranks, run = CHECKS[name]
    # The name of the file: one store serves one group.
    store = dist.FileStore(str(directory / f"store-{name}"), ranks)
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=EXCHANGE_LIMIT_S),
        )
        # No rank fails, and leaves, while another has yet to reach it.
        dist.barrier()
        run(rank, directory)
    except BaseException:  # noqa: BLE001 - torch's CheckpointException is no Exception
        return traceback.format_exc()
    finally:
        # The others stop waiting for a rank that has failed, since this closes its connections.
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
    # Threads of torch that outlive their process group abort an interpreter that ends, now and then.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
