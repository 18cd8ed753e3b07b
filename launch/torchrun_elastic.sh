#!/usr/bin/env bash
# Join a torchrun with elastic rendezvous: run it on each host, in any order. Hosts may come and go between MIN and MAX;
# at each change the ranks start again from the newest checkpoint.
#
#   launch/torchrun_elastic.sh MIN:MAX ADDRESS RUN.yaml [key=value ...] [options of lmscale train]
#
# ADDRESS       the host that keeps the rendezvous, the same on each host; it must stay
# NUM_RANKS=8   ranks of each host; left out: its CUDA devices, or 1
# MAX_RESTARTS=100
#
# The layout and the batch must divide over every number of hosts between MIN and MAX; that is checked first. output_dir is
# shared by all hosts. Nothing travels: set NCCL_* and GLOO_* where you start it. Signals, restarts and the exit status (0
# or 1) are torchrun's.
set -euo pipefail

if (($# < 3)); then
    echo "error: usage: $0 MIN:MAX ADDRESS RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
nnodes=$1
address=$2
run=$3
shift 3
exec lmscale train "$run" --launcher torchrun --nnodes "$nnodes" --master-addr "$address" \
    --max-restarts "${MAX_RESTARTS:-100}" ${NUM_RANKS:+--devices "$NUM_RANKS"} "$@"
