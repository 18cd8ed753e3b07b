#!/usr/bin/env bash
# Train on this host, by DeepSpeed's launcher.
#
#   launch/single_node.sh RUN.yaml [key=value ...] [options of lmscale train]
#
# NUM_RANKS=4   ranks, one for each device; left out: the CUDA devices of this host, or 1
#
# Nothing has to travel. --dry-run prints the command, TERM and Ctrl-C save and stop.
set -euo pipefail

if (($# < 1)); then
    echo "error: usage: $0 RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
run=$1
shift
exec lmscale train "$run" ${NUM_RANKS:+--devices "$NUM_RANKS"} "$@"
