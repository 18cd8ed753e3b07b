#!/usr/bin/env bash
# Train on the hosts of a hostfile, started by MPICH's mpiexec (Hydra). Run it on the first host.
#
#   launch/mpich.sh HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]
#
# MPI only starts the processes: ranks talk by NCCL or gloo, and no Python package for MPI is needed.
# Needs mpich on every host, and what launch/multi_node.sh needs but pdsh.
#
# The same variables travel as by launch/multi_node.sh, by -genvlist: NCCL_*, GLOO_* and so on, never a secret. (Left to
# itself, Hydra passes on the whole environment.)
set -euo pipefail

if (($# < 2)); then
    echo "error: usage: $0 HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
hostfile=$1
run=$2
shift 2
exec lmscale train "$run" --launcher mpich --hostfile "$hostfile" "$@"
