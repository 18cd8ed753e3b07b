#!/usr/bin/env bash
# Train on this host, by DeepSpeed's launcher.
#
#   launch/single_node.sh RUN.yaml [key=value ...]
#
# NUM_RANKS=4   ranks, one for each device; left out: the CUDA devices of this host, or 1
#
# `lmscale train RUN.yaml` does the same and more: it checks the run first, and passes signals on to the ranks. Here
# DeepSpeed's launcher handles signals, and loses ranks; to stop and save, make the file output_dir/STOP.
set -euo pipefail

run=${1:?usage: $0 RUN.yaml [key=value ...]}
shift
if [[ -z ${NUM_RANKS:-} ]]; then
    NUM_RANKS=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l)
fi
if [[ ! -e /dev/nvidia0 ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
exec deepspeed --num_accelerators "$((NUM_RANKS > 0 ? NUM_RANKS : 1))" --module lmscale.pretrain --config "$run" "$@"
