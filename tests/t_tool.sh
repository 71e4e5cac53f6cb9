#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed
# The program `ep` as its users meet it: what it prints, how it exits, and that it leaves no
# process behind: options, env, run, doctor. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

# ---- ep, help, options
want 0 "$ep" && has 'usage: ep COMMAND' && has 'doctor'
ok "without arguments it says what it can do"
for command in run demo bench doctor env; do
    want 0 "$ep" $command --help && has "usage: ep $command" && has '^options:'
    ok "$command --help"
    want 2 "$ep" $command --no-such-option && says 'no-such-option'
    ok "$command names an unknown option"
done
want 0 "$ep" --version && has '^ep [0-9]*\.[0-9]*\.[0-9]*$'
ok "--version"
want 2 "$ep" no-such-command && says no-such-command
ok "an unknown command is named"
want 2 "$ep" bench --tokens 0 && says '"0"' && want 2 "$ep" bench --tokens 12x && says 12x
ok "a number out of range is named"
want 2 "$ep" bench --tokens && says tokens
ok "a missing value is named"
want 2 "$ep" bench --dtype int3 && says int3 && says 'bf16|fp8|f32'
ok "a wrong choice is named, with the choices"
want 2 "$ep" bench --routing sideways && says sideways
ok "an unknown routing is named"
want 2 "$ep" bench --hidden 7 && says 14
ok "a row that is no multiple of 16 bytes is refused"
want 2 "$ep" bench --topk 9 --experts 8 && says 9
ok "more experts per token than experts are refused"
want 2 "$ep" bench --sweep tokens=1,x && says tokens=1,x
ok "a sweep that cannot be read is named"
want 2 "$ep" bench --routing half --topk 8 --experts 8 && says half
ok "half routing that a rank has too few experts for is refused"
want 2 "$ep" env surplus && says surplus
ok "a surplus argument is named"

# ---- ep env
want 0 "$ep" env && has '^EP_TIMEOUT_MS' && has '^EP_LOG'
ok "env lists the knobs"
want 0 env MASTER_ADDR=here "$ep" env && has '^MASTER_ADDR  *here' && has '^HOME'
ok "env lists the names of others"
want 0 env EP_TIMEOUT_MS=1234 "$ep" env && has '1234 \*'
ok "env marks what is set"
want 0 env EP_TIMEOUT_MS=soon "$ep" env && has '100000 !'
ok "env marks what is malformed"
want 0 "$ep" env --json && is_json "$tmp/out"
ok "env --json"

# ---- ep run
want 0 "$ep" run -n 3 -- sh -c \
    'echo $RANK/$LOCAL_RANK/$WORLD_SIZE/$LOCAL_WORLD_SIZE/$MASTER_ADDR/$MASTER_PORT/$EP_JOB' &&
    has '^\[0\] 0/0/3/3/127.0.0.1/' && has '^\[2\] 2/2/3/3/127.0.0.1/' &&
    [ "$(cut -d/ -f5- "$tmp/out" | sort -u | wc -l)" = 1 ]
ok "ranks find their environment, one port and one job"
"$ep" run -n 1 -- sh -c 'echo $EP_JOB; sleep 0.3' >"$tmp/a" &
want 0 "$ep" run -n 1 -- sh -c 'echo $EP_JOB; sleep 0.3'
wait $!
! cmp -s "$tmp/a" "$tmp/out"
ok "two runs have two job names"
want 0 "$ep" run -n 2 -- sh -c 'echo a; echo b >&2; printf c' &&
    [ "$(sort "$tmp/out" | tr '\n' ' ')" = '[0] a [0] c [1] a [1] c ' ] &&
    [ "$(sort "$tmp/err" | tr '\n' ' ')" = '[0] b [1] b ' ]
ok "lines are marked, unfinished ones too, and stderr stays stderr"
loop='i=0; while [ $i -lt 500 ]; do echo line $RANK $i; i=$((i+1)); done'
want 0 "$ep" run -n 4 -- sh -c "$loop" &&
    [ "$(wc -l <"$tmp/out")" = 2000 ] && ! grep -qv '^\[\([0-3]\)\] line \1 [0-9]*$' "$tmp/out"
ok "ranks' lines do not mix"
want 0 "$ep" run -n 1 -- sh -c 'head -c 40000 /dev/zero | tr "\0" x' &&
    [ "$(tr -cd x <"$tmp/out" | wc -c)" = 40000 ]
ok "nothing of a very long line is lost"
want 0 "$ep" run -n 2 -- cat && [ ! -s "$tmp/out" ]
ok "standard input is empty"
start=$(date +%s)
want 7 "$ep" run -n 3 -- sh -c "if [ \$RANK = 1 ]; then exit 7; fi; sleep $mark" &&
    says 'rank 1 exited with status 7' && [ $(($(date +%s) - start)) -lt 4 ] && gone "$mark"
ok "one failing rank ends the others, and its status is the result"
want 137 "$ep" run -n 3 -- sh -c "if [ \$RANK = 2 ]; then kill -9 \$\$; fi; sleep $mark" &&
    says 'rank 2 was killed by signal 9' && gone "$mark"
ok "a killed rank gives 128 + signal"
want 3 "$ep" run -n 2 -- sh -c "trap '' TERM; [ \$RANK = 1 ] || exit 3; sleep $mark; sleep 1" &&
    gone "$mark"
ok "a rank that ignores SIGTERM is killed in the end"
want 0 "$ep" run -n 2 -- sh -c "sleep $mark & exit 0" && gone "$mark"
ok "what a rank leaves in the background is ended"
want 127 "$ep" run -n 2 -- ./no-such-program && says no-such-program
ok "a program that is not there gives 127"
want 124 "$ep" run -n 2 --timeout 1 -- sleep "$mark" && says 'not done after 1 s' &&
    gone "$mark"
ok "--timeout gives 124"
for sig in TERM INT HUP; do
    case $sig in TERM) status=143 ;; INT) status=130 ;; HUP) status=129 ;; esac
    env --default-signal=INT "$ep" run -n 2 -- sleep "$mark" >"$tmp/out" 2>"$tmp/err" &
    pid=$!
    sleep 0.3
    kill -$sig $pid
    wait $pid
    [ $? = $status ] && gone "$mark"
    ok "SIG$sig reaches the ranks, and the status is $status"
done
"$ep" run -n 2 -- sh -c "sleep $mark; true" >"$tmp/out" 2>"$tmp/err" &
pid=$!
sleep 0.3
kill -9 $pid
{ wait $pid; } 2>/dev/null
gone "$mark" && gone "ep run -n 2"
ok "when ep run itself is killed, nothing is left"

# ---- output that cannot be written
for command in --help --version env "env --json" "bench --help" "demo --tokens 8 --device host" \
    "bench --tokens 8 --hidden 16 --iters 1 --json" "bench --tokens 8 --hidden 16 --iters 1" doctor; do
    want 1 sh -c "'$ep' $command >/dev/full" && says 'standard output: No space left' &&
        want 1 sh -c "'$ep' $command >&-" && says 'standard output: it is closed'
    ok "$command: output that cannot be written is a failure"
done
want 2 sh -c "'$ep' bench --tokens 0 >/dev/full 2>&-"
ok "a usage that is wrong stays that, without any stream"

# ---- ep doctor
want 0 "$ep" doctor && has 'ok  *host mode, processes' && has 'ok  *host mode, threads' &&
    has '[a-z]  *CUDA mode'
ok "doctor tries both modes and says what there is of CUDA"
want 0 "$ep" doctor --json && is_json "$tmp/out" && grep -q '"links"' "$tmp/out"
ok "doctor --json"

# ---- without a driver: a machine that has one cannot be made to lose it
case $(ldconfig -p 2>/dev/null; ls /usr/lib/*/libcuda.so.1 2>/dev/null) in
*libcuda.so.1*) ;;
*)
    want 0 "$ep" doctor && [ "$(grep -c 'CUDA mode\|NVRTC\|NVIDIA driver' "$tmp/out")" = 1 ] &&
        has 'missing  *CUDA mode'
    ok "doctor has one finding about GPUs where there are none"
    for command in bench demo; do
        want 1 "$ep" $command --device cuda && [ "$(wc -l <"$tmp/err")" = 1 ] &&
            [ ! -s "$tmp/out" ] && says "^ep $command: --device cuda: .*libcuda"
        ok "$command --device cuda says in one sentence that there is no driver"
    done
    want 0 "$ep" demo --device auto --tokens 20 && has PASS && ! has GPU
    ok "demo --device auto works without a GPU, and says nothing of one"
    ;;
esac
echo "1..$n"
