#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# run.sh PROGRAM CORPUS: runs a fuzz target for FUSEDADAM_FUZZ_SECONDS (5) on a folder of inputs,
# to which it adds. Prints how many inputs it tried and how much of the code they reached. Fails if
# it finds something, and if it tried nothing.
set -euo pipefail
program=$1 corpus=$2
name=$(basename "$program")
log=$corpus.log
mkdir -p "$corpus"
# By itself, libFuzzer starts with an empty input and stays with short ones. Their missing bytes all
# stand for the most ordinary values.
if [[ -z $(find "$corpus" -type f -print -quit) ]]; then
  for i in {1..200}; do head -c 480 /dev/urandom >"$corpus/seed-$i"; done
fi

# An input consists of some decisions and a few numbers. No target reads more than 512 bytes.
# OpenMP's threads must not spin on cores that other targets use.
status=0
OMP_WAIT_POLICY=passive ASAN_OPTIONS=quarantine_size_mb=16:allocator_release_to_os_interval_ms=-1 \
  UBSAN_OPTIONS=print_stacktrace=1 \
  "$program" -max_total_time="${FUSEDADAM_FUZZ_SECONDS:-5}" -max_len=512 -len_control=0 -reduce_inputs=0 \
  -timeout=60 -print_final_stats=1 -artifact_prefix="$corpus-" "$corpus" >"$log" 2>&1 || status=$?

inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
reached=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
edges=$(sed -n 's/.*(\([0-9]*\) inline 8-bit counters).*/\1/p' "$log" | tail -n 1)
if ((status != 0)) || ((${inputs:-0} == 0)); then
  grep -v '^#' "$log" || true  # without the progress lines
  echo "$name failed after ${inputs:-no} inputs; run it with the file named above to see it again"
  exit 1
fi
echo "$name: $inputs inputs, $reached of $edges edges, $(find "$corpus" -type f | wc -l) inputs kept"
