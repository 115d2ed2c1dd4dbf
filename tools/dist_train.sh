#!/usr/bin/env bash
# Trains on several GPUs of one machine, or of NNODES machines:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# On each of several machines, with NODE_RANK 0, 1, ... and the first one's address:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 tools/dist_train.sh CONFIG 8
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 gpus=$2
shift 2
[[ $gpus =~ ^[1-9][0-9]*$ ]] || { echo "$0: $gpus GPUs: expected a number of at least 1" >&2; exit 2; }
exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
