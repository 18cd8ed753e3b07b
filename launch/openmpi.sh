#!/usr/bin/env bash
# Train on the hosts of a hostfile, started by OpenMPI's mpirun. Run it on the first host.
#
#   launch/openmpi.sh HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]
#
# MPI only starts the processes: ranks talk by NCCL or gloo, and no Python package for MPI is needed.
# Needs openmpi-bin on every host, and what launch/multi_node.sh needs but pdsh. OpenMPI refuses root, unless
# OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 are set, as in a container.
#
# The same variables travel as by launch/multi_node.sh, by mpirun -x: NCCL_*, GLOO_* and so on, never a secret.
set -euo pipefail

if (($# < 2)); then
    echo "error: usage: $0 HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
hostfile=$1
run=$2
shift 2
exec lmscale train "$run" --launcher openmpi --hostfile "$hostfile" "$@"
