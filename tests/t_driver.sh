#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest, long
# CUDA groups without a GPU: test programs on the driver of tests/driver, which runs the host bodies
# of the kernels, as many at once as there are cores. One point for each program; its output is in
# TAP_LOGS. Under sanitizers too, where it is slow some of them.
# With --one PROGRAM it runs that program.
build=${TAP_BUILD:-build}
logs=${TAP_LOGS:-$build/logs}/driver
if [ "$1" = --one ]; then
    case $2 in
    t_handoff | t_layout | t_mismatch | t_storm) sms=64 ;; # whose groups ask for many, or may have them
    t_abort | t_stats | t_cuda_streams) sms=16 ;;
    *) sms=8 ;;
    esac
    # shellcheck disable=SC2086
    LD_LIBRARY_PATH=$PWD/$build/driver EP_TEST_DEVICE=cuda EP_TEST_DRIVER=1 EP_TEST_PAIRS=10 \
        EP_TEST_SMS=$sms \
        timeout -k 5 $((100 * ${TAP_TIMEOUT_SCALE:-1})) $TAP_PREFIX "$build/tests/$2" \
        >"$logs/$2.tap" 2>"$logs/$2.err"
    echo $? >"$logs/$2.rc"
    exit 0
fi
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$logs" "$tmp/cache"
chmod 700 "$tmp/cache"
EP_JIT_CACHE=$tmp/cache
# The driver finds kernels by their names; what a compiler makes of them it does not look at.
EP_NVRTC_PATH=$PWD/$build/driver/libnvrtc.so.13
export EP_JIT_CACHE EP_NVRTC_PATH

programs="t_handoff t_layout t_dispatch_compact t_dispatch_expanded t_combine t_rowtypes t_cached
    t_capacity t_mismatch t_experts t_local t_epoch t_begin_finish t_stats t_args t_args_operations t_abort
    t_cuda_pointers t_cuda_streams t_cuda_order t_cuda_handles t_cuda_groups t_cuda_memory
    t_cuda_graph t_grow t_ll_graph t_cuda_device_end t_cuda_soak
    t_fork t_storm t_ll t_ll_order t_ll_args t_ll_masks t_thread_end t_cuda_suspend"
case $build in
*/san) programs="t_handoff t_capacity t_begin_finish t_stats t_args_operations t_abort t_cuda_pointers
    t_cuda_streams t_cuda_order t_cuda_handles t_cuda_groups t_cuda_memory t_cuda_soak" ;;
*/tsan) programs="t_handoff t_cuda_streams t_cuda_order t_cuda_groups t_cuda_memory" ;;
esac
[ "$TAP_EFFORT" != quick ] || programs="t_handoff t_combine t_capacity t_cuda_streams"
n=0
bad=0
# shellcheck disable=SC2086
printf '%s\n' $programs | xargs -n 1 -P "$(nproc 2>/dev/null || echo 2)" sh "$0" --one
for program in $programs; do
    n=$((n + 1))
    if [ "$(cat "$logs/$program.rc")" = 0 ]; then
        echo "ok $n - $program: $(grep -c '^ok' "$logs/$program.tap") points"
    else
        bad=1
        echo "not ok $n - $program"
        grep -h -B5 '^not ok\|^Bail\|WARNING: Thr\|ERROR: Addr\|runtime error' \
            "$logs/$program.tap" "$logs/$program.err" | head -24 | sed 's/^/# /'
    fi
done
echo "1..$n"
exit $bad
