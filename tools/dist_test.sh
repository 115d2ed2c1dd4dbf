#!/usr/bin/env bash
# Evaluates on several GPUs of one machine:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,3s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 checkpoint=$2 gpus=$3
shift 3
[[ $gpus =~ ^[1-9][0-9]*$ ]] || { echo "$0: $gpus GPUs: expected a number of at least 1" >&2; exit 2; }
exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
