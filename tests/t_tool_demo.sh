#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest
# `ep demo` and the example on host ranks: what they print, and that signals end them. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

# ---- ep demo
want 0 "$ep" demo --device host --tokens 300 --batch 32 && has PASS && ! has "$(printf '\r')"
ok "demo passes, and draws no bar where there is no terminal"
want 0 "$ep" demo -n 3 --tokens 10 --batch 4 && has PASS
ok "demo with ranks that run out of tokens"
printf 'to be, or not to be' >"$tmp/text"
want 0 "$ep" demo --file "$tmp/text" && has "$tmp/text: 7 tokens"
ok "demo reads the text it is given"
want 1 "$ep" demo --file "$tmp/no-such-text" && says no-such-text
ok "a text that is not there is named"
for sig in INT TERM; do
    env --default-signal=INT "$ep" demo --tokens 99999 --batch 17 >"$tmp/out" 2>"$tmp/err" &
    pid=$!
    sleep 1
    kill -$sig $pid
    wait $pid
    status=$?
    { [ $status = 130 ] || [ $status = 143 ]; } && gone "demo --tokens 99999"
    ok "SIG$sig ends the demo and its ranks"
done

# ---- the example
if [ -x "$build/examples/moe_layer" ]; then
    want 0 "$build/examples/moe_layer" &&
        [ "$(grep -c 'every answer is right' "$tmp/out")" = 4 ]
    ok "the example works alone"
    want 0 "$ep" run -n 3 -- "$build/examples/moe_layer" &&
        [ "$(grep -c 'every answer is right' "$tmp/out")" = 3 ]
    ok "the example works under ep run"
    # What mpirun, mpiexec, srun and torchrun set, without them. NAME RANK SIZE OTHERS
    while read -r name rank size others; do
        pids=
        for i in 0 1 2; do
            # shellcheck disable=SC2086
            env -u RANK -u WORLD_SIZE $rank=$i $size=3 $others "$build/examples/moe_layer" \
                >"$tmp/launched$i" 2>"$tmp/err$i" &
            pids="$pids $!"
        done
        failed=0
        for pid in $pids; do
            wait "$pid" || failed=1
        done
        cat "$tmp"/launched? >"$tmp/out"
        cat "$tmp"/err? >"$tmp/err"
        [ $failed = 0 ] && [ "$(grep -c 'of 3: .*every answer is right' "$tmp/out")" = 3 ] &&
            [ "$(wc -l <"$tmp/out")" = 3 ]
        ok "the example is one group of 3 ranks under $name"
    done <<END
torchrun RANK WORLD_SIZE MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 LOCAL_WORLD_SIZE=3 EP_JOB=example-$$
mpirun OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_SIZE=3 EP_JOB=example-$$
mpiexec PMI_RANK PMI_SIZE MPI_LOCALNRANKS=3 EP_JOB=example-$$
srun SLURM_PROCID SLURM_NTASKS SLURM_STEP_ID=0 SLURM_NNODES=1 SLURM_JOB_ID=$$ EP_JOB=example-$$
END
fi
echo "1..$n"
