#!/usr/bin/env bash
# Two ranks on this machine, then a stop and a start with one: the same run goes on.
#
#     examples/two_ranks.sh DATA RUN
set -euo pipefail
data=$1
run=$2
here=$(cd "$(dirname "$0")/.." && pwd)

settings=("data=$data" "run=$run" global_batch_size=128 log.tensorboard=false)
deepspeed --num_gpus 2 "$here/launch/train.py" "${settings[@]}" epochs=1
python "$here/launch/train.py" "${settings[@]}" epochs=2
python "$here/launch/evaluate.py" --run "$run"
