#!/usr/bin/env bash
# Train on the hosts of a hostfile by torchrun with static rendezvous, started on each of them over ssh.
#
#   launch/torchrun.sh HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]
#
# Needs what launch/multi_node.sh needs but pdsh; the same variables travel, never a secret.
# Where a scheduler starts something on each host by itself, let it start
#   lmscale train RUN.yaml --launcher torchrun --devices 8 --nnodes 2 --node-rank K --master-addr HOST
set -euo pipefail

if (($# < 2)); then
    echo "error: usage: $0 HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
hostfile=$1
run=$2
shift 2
exec lmscale train "$run" --launcher torchrun --hostfile "$hostfile" "$@"
