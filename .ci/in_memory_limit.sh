#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
#     .ci/in_memory_limit.sh BYTES COMMAND...
#
# Runs a command whose memory, and what it has of files in memory, is limited, and prints how often
# it met the limit. Needs root and a control group of version 1 or 2 that may be made.
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
  awk '$1 == "max" { print "limit met", $2, "times" }' "$group/memory.events"
else
  echo "limit met $(<"$group/memory.failcnt") times"
fi
exit "$status"
