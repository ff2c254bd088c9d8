#!/bin/bash
# Starts one rank for each device of this host, where no launcher does: in a pod, or a task of a cloud.
#
#     HOSTS=2 HOST_RANK=0 RANKS_PER_HOST=8 MASTER_ADDR=host0 \
#         launch/templates/ranks.sh launch/train.py --config default data=DIR run=DIR
#
# A request to stop goes on to all ranks, however long their checkpoint takes. The status is that of the
# ranks: a scheduler can act on 75, 2 and 3. (torchrun's is 1 for all of them.)
set -u

ranks=()
stopped=
interrupted=
stop() {
    stopped=yes
    interrupted=yes
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
for rank in "${ranks[@]}"; do
    while true; do
        interrupted=
        wait "$rank"
        code=$?
        # A signal ends `wait` too, while the rank goes on.
        [ "$interrupted" ] && [ "$code" -gt 128 ] || break
    done
    # 4 says that another rank is gone: that one's status says why.
    if [ "$status" -eq 0 ] || { [ "$status" -eq 4 ] && [ "$code" -ne 0 ]; }; then
        status=$code
    fi
done
exit "$status"
