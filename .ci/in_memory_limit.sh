#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
#     .ci/in_memory_limit.sh BYTES COMMAND...
#
# Runs a command with limited memory, page cache included, and prints how often it hit the limit.
# Needs root and permission to create a control group (version 1 or 2).
set -euo pipefail
if (($# < 2)); then
  echo "usage: ${0##*/} BYTES COMMAND..." >&2
  exit 2
fi
bytes=$1
shift
if [[ -d /sys/fs/cgroup/memory ]]; then
  group=/sys/fs/cgroup/memory/fusedadam-$$ limit=memory.limit_in_bytes
else
  group=/sys/fs/cgroup/fusedadam-$$ limit=memory.max
fi
mkdir "$group"
trap 'rmdir "$group"' EXIT
echo "$bytes" >"$group/$limit"
status=0
(
  echo "$BASHPID" >"$group/cgroup.procs"
  exec "$@"
) || status=$?
if [[ $limit == memory.max ]]; then
  awk '$1 == "max" { print "limit hit", $2, "times" }' "$group/memory.events"
else
  echo "limit hit $(<"$group/memory.failcnt") times"
fi
exit "$status"
