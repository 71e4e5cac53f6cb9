#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed, long
# `ep run`: what its ranks find, where their output goes, and that it can always be ended and leaves
# no process behind. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

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
want 0 "$ep" run -n 2 -- sh -c 'echo ${#EP_JOB_KEY}/$EP_JOB_KEY' && has '^\[0\] 64/[0-9a-f]*$' &&
    [ "$(cut -d/ -f2 "$tmp/out" | sort -u | wc -l)" = 1 ] && cp "$tmp/out" "$tmp/a" &&
    want 0 "$ep" run -n 2 -- sh -c 'echo ${#EP_JOB_KEY}/$EP_JOB_KEY' && ! cmp -s "$tmp/a" "$tmp/out"
ok "ranks of a run have one key, and each run another"
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
want 0 "$ep" run -n 2 -- sh -c "sleep $mark & setsid sleep $mark & exit 0" && gone "$mark" &&
    says 'ended what ranks had left running: sleep ('
ok "what a rank leaves in the background is ended and named, in a session of its own, too"
want 0 "$ep" run -n 2 -- sh -c "sleep 0.2 & exit 0" && [ ! -s "$tmp/err" ]
ok "what ends by itself soon is worth no word"
want 127 "$ep" run -n 2 -- ./no-such-program && says no-such-program
ok "a program that is not there gives 127"
want 124 "$ep" run -n 2 --timeout 1 -- sleep "$mark" && says 'not done after 1 s' &&
    gone "$mark"
ok "--timeout gives 124"
for sig in TERM INT HUP; do
    case $sig in TERM) status=143 ;; INT) status=130 ;; HUP) status=129 ;; esac
    env --default-signal=INT "$ep" run -n 2 -- sleep "$mark" >"$tmp/out" 2>"$tmp/err" &
    pid=$!
    come "$mark"
    kill -$sig $pid
    wait $pid
    [ $? = $status ] && gone "$mark"
    ok "SIG$sig reaches the ranks, and the status is $status"
done
"$ep" run -n 2 -- sh -c "setsid sleep $mark & sleep $mark; true" >"$tmp/out" 2>"$tmp/err" &
pid=$!
come "$mark"
kill -9 $pid
{ wait $pid; } 2>/dev/null
gone "$mark" && gone "ep run -n 2"
ok "when ep run itself is killed, nothing is left, nor in a session of its own"
"$ep" run -n 2 -- sh -c "setsid sleep $mark & sleep $mark; true" >"$tmp/out" 2>"$tmp/err" &
pid=$!
come "$mark"
kill -9 "$(child_of $pid)"
wait $pid
[ $? = 1 ] && gone "$mark" && says 'the process that watches the ranks was killed'
ok "nor when the process between it and the ranks is"

# ---- ending what does not want to be ended
# All at the same time. A scene's processes are named by a number of its own.
begin() { # begin FILE HOW COMMAND...: starts `ep run` with the rank's program and ends it in that way
    scene_out=$1 scene_how=$2 limit=0
    shift 2
    [ $scene_how != timeout ] || limit=1
    env --default-signal=INT "$ep" run -n 2 -t $limit -- "$@" >"$scene_out" 2>"$tmp/err" &
    scene_pid=$!
    case $scene_how in
    TERM) come "$scene_mark" && sleep 0.5 && kill -TERM $scene_pid ;;
    INT-INT)
        come "$scene_mark" && sleep 0.5 && kill -INT $scene_pid && sleep 0.3
        kill -INT $scene_pid 2>/dev/null # unless the first was enough
        ;;
    esac
    wait $scene_pid
    case $scene_how$? in
    TERM143 | INT-INT130 | timeout124 | failure9) gone "$scene_mark" && echo good >"$scene_good" ;;
    esac
}
mkfifo "$tmp/unread"
exec 9<>"$tmp/unread"
i=0
for how in TERM INT-INT timeout failure; do
    i=$((i + 1))
    scene_mark=$mark$i scene_good=$tmp/session-$how
    # shellcheck disable=SC2016
    begin "$tmp/out" $how setsid sh -c 'trap "" TERM
        [ $RANK$0 != 1failure ] || exit 9; sleep '"$scene_mark; sleep $scene_mark" $how &
    scene_mark=${mark}5$i scene_good=$tmp/unread-$how
    # shellcheck disable=SC2016
    begin "$tmp/unread" $how sh -c '[ $RANK$0 != 1failure ] || { sleep 0.5; exit 9; }
        while :; do echo '"$scene_mark; done" $how &
done
wait
for how in TERM INT-INT timeout failure; do
    [ -e "$tmp/session-$how" ]
    ok "ranks in sessions of their own that ignore SIGTERM end ($how)"
    [ -e "$tmp/unread-$how" ]
    ok "it ends while nobody reads its output ($how)"
done
exec 9<&-
exec 9<>"$tmp/unread"
"$ep" run -n 2 -- head -c 200000 /dev/zero >"$tmp/unread" 2>&1 &
pid=$!
sleep 0.5
kill -0 $pid && kill -TERM $pid
wait $pid
[ $? = 143 ] && gone "ep run -n 2 -- head"
ok "so it does when all ranks have ended, and stderr is not read either"
if command -v python3 >/dev/null; then
    exec 9<&-
    exec 9<>"$tmp/unread"
    python3 -c 'import fcntl, os, sys
fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_NONBLOCK)
os.execv(sys.argv[1], sys.argv[1:])' "$ep" run -n 2 -- yes "$mark" >"$tmp/unread" 2>"$tmp/err" &
    pid=$!
    come "$mark"
    sleep 1
    ticks=$(sed 's/.*) //' /proc/$pid/stat | awk '{ print $12 + $13 }')
    kill -TERM $pid
    wait $pid
    [ $? = 143 ] && [ "$ticks" -lt 50 ] && gone "$mark"
    ok "it does not spin on an output that does not block ($ticks ticks)"
fi
exec 9<&-
slow='for i in 1 2 3; do read -r line; sleep 0.2; done; cat'
"$ep" run -n 2 -- sh -c 'head -c 300000 /dev/zero | tr "\0" x | fold -w 99; echo' 2>&1 |
    sh -c "echo; $slow" >"$tmp/out"
[ "$(tr -cd x <"$tmp/out" | wc -c)" -gt 599000 ] && ! grep -qv '^\(\[[01]\] x*\)*$' "$tmp/out"
ok "nothing is lost where the reader is slow"

# ---- signals that do not end it
"$ep" run -n 2 -- sh -c "trap 'echo first' USR1; trap 'echo second; exit 0' USR2
    echo ready; while :; do sleep 0.1; done" >"$tmp/out" 2>"$tmp/err" &
pid=$!
await 2 ready
kill -USR1 $pid
await 2 first
kill -USR2 $pid
wait $pid
[ $? = 0 ] && [ "$(grep -c second "$tmp/out")" = 2 ]
ok "SIGUSR1 and SIGUSR2 reach the ranks"
timeout 60 "$ep" run -n 2 -t 6 -- setsid sh -c 'echo ready; i=0; while [ $i -lt 20 ]; do
    sleep 0.1; i=$((i+1)); echo $i; done' >"$tmp/out" 2>"$tmp/err" &
outer=$!
await 2 ready
pid=$(child_of $outer)
kill -TSTP "$pid"
stopped=1
for _ in $(seq 50); do
    case $(state_of "$pid")$(state_of "$(child_of "$(child_of "$pid")")") in TT) stopped=0 && break ;; esac
    sleep 0.1
done
lines=$(wc -l <"$tmp/out")
sleep 6
[ $stopped = 0 ] && [ "$(wc -l <"$tmp/out")" = "$lines" ] && kill -CONT "$pid"
still=$?
kill -CONT "$pid"
wait $outer
status=$?
[ $status$still = 00 ] || echo "# status $status, stopped: $stopped, nothing came meanwhile: $still"
[ $status = 0 ] && [ $still = 0 ] && [ "$(grep -c '20$' "$tmp/out")" = 2 ]
ok "Ctrl-Z stops the ranks too, fg continues them, and the time between does not count"

# ---- output that cannot be written
want 1 sh -c "'$ep' run -n 2 -- echo hello >/dev/full" && says 'standard output: No space left'
ok "a full disk is a failure, and said"
want 1 sh -c "'$ep' run -n 2 -- echo hello >&-" && says 'standard output: it is closed'
ok "so is a closed output"
want 0 sh -c "'$ep' run -n 2 -- true >&- 2>&- <&-"
ok "who says nothing needs no output"
( "$ep" run -n 2 -- sh -c "while :; do echo $mark; done" 2>"$tmp/err"; echo $? >"$tmp/status" ) |
    head -1 >"$tmp/out"
[ "$(cat "$tmp/status")" = 141 ] && says 'Broken pipe' && gone "$mark"
ok "a reader that goes ends the ranks"

echo "1..$n"
