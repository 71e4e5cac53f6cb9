#!/bin/sh
# SPDX-License-Identifier: MIT
# class: exclusive
# The program `ep` as its users meet it: what it prints, how it exits, and that it leaves no
# process behind. TAP; EP_BUILD is the directory of the build (default build).
cd "$(dirname "$0")/.." || exit 1
build=${EP_BUILD:-build}
ep=$build/ep
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
n=0
mark=98765.$$ # a number of seconds that names our sleeps

ok() { # ok WHAT: the status of the last command decides
    if [ $? = 0 ]; then verdict=ok; else verdict="not ok"; fi
    n=$((n + 1))
    echo "$verdict $n - $1"
    [ "$verdict" = ok ] || sed 's/^/# /' "$tmp/out" "$tmp/err" | tail -12
}
# want STATUS COMMAND...: runs it, output in $tmp/out and $tmp/err
want() {
    want_status=$1
    shift
    "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    got_status=$?
    [ $got_status = "$want_status" ] || { echo "# status $got_status: $*"; false; }
}
has() { grep -q -e "$1" "$tmp/out"; }
says() { grep -q -e "$1" "$tmp/err"; }
left() { # left MARK: a process whose command line holds MARK is alive
    for f in /proc/[0-9]*/cmdline; do
        case $(tr '\0' ' ' 2>/dev/null <"$f") in *"$1"*) return 0 ;; esac
    done 2>/dev/null
    return 1
}
gone() { # gone MARK: within two seconds nothing of it is left
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        left "$1" || return 0
        sleep 0.2
    done
    return 1
}
is_json() { ! command -v python3 >/dev/null || python3 -m json.tool <"$1" >/dev/null; }

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

# ---- on the driver for tests, which tests/t_driver.sh runs programs on
if [ -e "$build/driver/libcuda.so.1" ]; then
    mkdir -m 700 "$tmp/cache"
    cuda() { # cuda STATUS COMMAND...
        cuda_status=$1
        shift
        want "$cuda_status" env LD_LIBRARY_PATH="$PWD/$build/driver" EP_JIT_CACHE="$tmp/cache" \
            EP_NVRTC_PATH="$PWD/$build/driver/libnvrtc.so.13" EP_TEST_SMS=4 "$@"
    }
    cuda 0 "$ep" doctor && has 'ok  *CUDA mode' && has 'ok  *GPU  *1: a device for tests' &&
        has 'ok  *NVRTC  *13.0, .*/driver/libnvrtc' && has 'ok  *links between GPUs' &&
        has 'ok  *copies between GPUs  *[0-9.]* GB/s'
    ok "doctor finds GPUs, measures what is between them, and tries the CUDA mode"
    tiny="-n 2 --tokens 32 --hidden 256 --experts 16 --topk 4 --iters 2 --warmup 1"
    # shellcheck disable=SC2086
    cuda 0 "$ep" bench --device cuda $tiny && has 'data checked' && has '^link: [0-9]' &&
        [ "$(grep -c '  eager  ' "$tmp/out")" = 14 ] && [ "$(grep -c '  graph  ' "$tmp/out")" = 14 ]
    ok "bench --device cuda checks its data, eager and as a graph"
    cuda 0 "$ep" demo --device cuda -n 2 --tokens 60 --batch 16 && has PASS &&
        has '2 processes' && has 'rows are on 1 x a device for tests, 0'
    ok "demo --device cuda passes"
fi

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

# ---- ep bench
small="--tokens 64 --hidden 64 --experts 16 --topk 4 --iters 3 --warmup 1"
for more in "" "--expanded" "--threads" "--dtype fp8 --hidden 256" "--dtype f32" \
    "-n 3 --uncached" "--routing grouped --groups 4 --topk-groups 2" \
    "--routing skewed --copy" "-n 1 --arena" "--routing half" "-n 3 --routing half --expanded" \
    "--expanded --dtype fp8 --hidden 256 --routing skewed --threads"; do
    # shellcheck disable=SC2086
    want 0 "$ep" bench $small $more && has '^route' && has '^combine from' && has GB/s
    ok "bench ${more:-as it is} checks its data and passes"
done
want 0 "$ep" bench $small -n 3 --routing half --tokens 60 && has 'busiest rank 1.50 x'
ok "half routing gives rank 0 half of all rows"
printf '1 2 3 4\n5,6,7,8\n-1 9 10 11\n' >"$tmp/ids"
want 0 "$ep" bench $small --routing "file:$tmp/ids" && has 'file routing'
ok "bench replays ids from a file"
printf '1 2 99 4\n' >"$tmp/ids"
want 1 "$ep" bench $small --routing "file:$tmp/ids" && says 99
ok "a bad id in the file is named"
want 0 "$ep" bench $small --sweep 'tokens=8,16;hidden=64,128' --json && is_json "$tmp/out" &&
    [ "$(grep -c '"phase": "route"' "$tmp/out")" = 4 ]
ok "bench --json with a sweep of four cases"
want 0 "$ep" bench $small --csv && [ "$(wc -l <"$tmp/out")" = 9 ] &&
    [ "$(awk -F, '{ print NF }' "$tmp/out" | sort -u | wc -l)" = 1 ]
ok "bench --csv has one line per phase, all of one width"
want 1 "$ep" bench --tokens 1000000 --hidden 65536 && says 'lower --tokens'
ok "a case that does not fit in memory is refused before it starts"

# ---- the example
if [ -x "$build/examples/moe_layer" ]; then
    want 0 "$build/examples/moe_layer" &&
        [ "$(grep -c 'every answer is right' "$tmp/out")" = 4 ]
    ok "the example works alone"
    want 0 "$ep" run -n 3 -- "$build/examples/moe_layer" &&
        [ "$(grep -c 'every answer is right' "$tmp/out")" = 3 ]
    ok "the example works under ep run"
fi
echo "1..$n"
