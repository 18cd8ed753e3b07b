#!/usr/bin/env bash
# Train on the hosts of a hostfile, by DeepSpeed's launcher over pdsh and ssh. Run it on the first host.
#
#   launch/multi_node.sh HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]
#
# Needs, on this host, pdsh and openssh-client; on every host openssh-server, ssh without a password, and at the same
# paths the Python environment, the corpora and output_dir. `lmscale doctor --hostfile HOSTFILE` looks at all of that.
#
# These variables travel from here to every host: NCCL_*, GLOO_*, UCX_*, FI_*, PYTHON*, PYTORCH_*, OMP_NUM_THREADS and
# what ~/.deepspeed_env or ./.deepspeed_env name, one NAME=value to a line. Where hosts have several networks, name the
# interface: GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=eth0. What looks like a secret by its name (*TOKEN*,
# *PASSWORD*, *API_KEY* and the like) never travels: it would stand on command lines. Keep it in a file on each host.
#
# --dry-run prints what runs on each host. TERM and Ctrl-C, or the file output_dir/STOP, save and stop.
set -euo pipefail

if (($# < 2)); then
    echo "error: usage: $0 HOSTFILE RUN.yaml [key=value ...] [options of lmscale train]" >&2
    exit 2
fi
hostfile=$1
run=$2
shift 2
exec lmscale train "$run" --launcher pdsh --hostfile "$hostfile" "$@"
