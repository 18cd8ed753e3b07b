#!/usr/bin/env bash
# Train on the hosts of a hostfile, by DeepSpeed's launcher over pdsh and ssh. Run it on the first host.
#
#   launch/multi_node.sh HOSTFILE RUN.yaml [key=value ...]
#
# On each host, at the same paths: the Python environment, the corpora, output_dir. Packages: pdsh, openssh-server.
# pdsh hands arguments to a remote shell: keep brackets and dollar signs out of key=value, or put them in RUN.yaml.
#
# Of the environment, DeepSpeed passes on NCCL*, PYTHON*, UCX* and what ~/.deepspeed_env or ./.deepspeed_env name, one
# NAME=value to a line. Where hosts have several networks, name the interface there:
#   GLOO_SOCKET_IFNAME=eth0
#   NCCL_SOCKET_IFNAME=eth0
# To stop and save, make the file output_dir/STOP.
set -euo pipefail

hostfile=${1:?usage: $0 HOSTFILE RUN.yaml [key=value ...]}
run=${2:?usage: $0 HOSTFILE RUN.yaml [key=value ...]}
shift 2
exec deepspeed --hostfile "$hostfile" --force_multi --module lmscale.pretrain --config "$run" "$@"
