#!/bin/bash
# Starts one rank for each device of this host, where no launcher does: in a pod, or a task of a cloud.
#
#     HOSTS=2 HOST_RANK=0 RANKS_PER_HOST=8 MASTER_ADDR=host0 \
#         launch/templates/ranks.sh launch/train.py --config default data=DIR run=DIR
#
# A request to stop goes on to all ranks, however long their checkpoint takes. The status is that of the
# first rank that does not end with 0: a scheduler can act on 75, 2 and 3. (torchrun's is 1 for all of
# them.) Needs bash 5.1.
set -u

ranks=()
stopped=
stop() {
    stopped=yes
    kill -TERM "${ranks[@]}" 2>/dev/null
}
trap stop TERM USR1 INT HUP

export WORLD_SIZE=$((HOSTS * RANKS_PER_HOST)) LOCAL_WORLD_SIZE=$RANKS_PER_HOST
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
for ((local_rank = 0; local_rank < RANKS_PER_HOST; local_rank++)); do
    RANK=$((HOST_RANK * RANKS_PER_HOST + local_rank)) LOCAL_RANK=$local_rank \
        "${PYTHON:-python}" "$@" &
    ranks+=($!)
done
[ -z "$stopped" ] || stop # asked while they were started

status=0
left=$RANKS_PER_HOST
while ((left > 0)); do
    unset ended
    wait -n -p ended
    code=$?
    [ -v ended ] || continue # it was a signal
    left=$((left - 1))
    if ((status == 0)); then
        status=$code
    fi
done
exit "$status"
