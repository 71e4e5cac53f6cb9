#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed
# The program `ep` as its users meet it: what it prints, how it exits, and that it leaves no
# process behind: options, env, doctor. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

# ---- ep, help, options
want 0 "$ep" && has 'usage: ep COMMAND' && has 'doctor'
ok "without arguments it says what it can do"
for command in run demo bench predict doctor env; do
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

# ---- ep predict
shape="--tokens 2048 --hidden 256 --experts 32 --topk 4 --dtype bf16"
# shellcheck disable=SC2086
"$ep" bench -n 4 $shape --iters 1 --json >"$tmp/bench" 2>"$tmp/err"
sent=$(sed -n 's/.*"dispatch_arena".*"remote_bytes": \([0-9]*\).*/\1/p' "$tmp/bench")
# near COLUMN OPTION...: the MB that it says each of 4 GPUs sends are what the ranks of the bench sent
near() {
    column=$1
    shift
    # shellcheck disable=SC2086
    want 0 "$ep" predict "$@" $shape && awk -v sent="${sent:-0}" -v c="$column" '$1 == "dispatch," {
        d = 4e6 * $c / sent; exit !(d > 0.98 && d < 1.02) }' "$tmp/out"
}
near 3 --gpus 4 --nodes 1
ok "predict counts the bytes over a link that a bench has sent"
near 5 --gpus 1 --nodes 4
ok "predict counts the same over the network where each is a node"
want 0 "$ep" predict --nodes 128 && has '^1024 ranks on 128 nodes' && has '^low-latency combine .*network$' &&
    want 0 "$ep" predict --nodes 2 --link 20 && has '^dispatch, FP8 .* link$' &&
    want 0 "$ep" predict --tokens 1 && has '^dispatch, FP8 .* hand-offs$'
ok "predict says what holds an operation, up to 1024 ranks"
want 0 "$ep" predict --deepep && has '^ 256 combine ' &&
    has '^  32 dispatch    58 GB/s    1887     1203  64 %    1641  87 %     245  (c)'
ok "predict has DeepEP's figures, with how busy they keep each link"
want 2 "$ep" predict --nodes 200 && says 1024 && want 2 "$ep" predict --hidden 100 && says 128 &&
    want 2 "$ep" predict --topk 9 --experts 8 && says topk && want 2 "$ep" predict --deepep --nodes 2 &&
    says 'no other option'
ok "predict names what no group can be"

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
want 0 env FI_PROVIDER=nosuch "$ep" doctor && has 'missing  *libfabric'
ok "doctor says that there is no libfabric, or none of its providers"
if unshare -rn true 2>/dev/null; then
    want 0 unshare -rn "$ep" doctor && has 'ok  *Unix sockets' && has 'missing  *loopback TCP' &&
        has 'ok  *host mode, processes'
    ok "doctor tells a loopback that is down, and that ranks of one host need none"
fi

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
