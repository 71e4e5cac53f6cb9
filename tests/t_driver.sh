#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest
# CUDA groups without a GPU: test programs on the driver of tests/driver, which runs the host bodies
# of the kernels. One point for each program; its output is in TAP_LOGS. Under sanitizers too, where
# it is slow some of them.
build=${TAP_BUILD:-build}
logs=${TAP_LOGS:-$build/logs}/driver
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$logs" "$tmp/cache"
chmod 700 "$tmp/cache"
EP_JIT_CACHE=$tmp/cache
# The driver finds kernels by their names; what a compiler makes of them it does not look at.
EP_NVRTC_PATH=$PWD/$build/driver/libnvrtc.so.13
export EP_JIT_CACHE EP_NVRTC_PATH

programs="t_handoff t_layout t_dispatch_compact t_dispatch_expanded t_combine t_rowtypes t_cached
    t_capacity t_mismatch t_begin_finish t_stats t_args t_args_operations t_abort t_cuda_pointers
    t_cuda_streams t_cuda_memory t_cuda_soak"
case $build in
*/san) programs="t_handoff t_capacity t_begin_finish t_stats t_args_operations t_abort t_cuda_pointers
    t_cuda_streams t_cuda_memory t_cuda_soak" ;;
*/tsan) programs="t_handoff t_cuda_streams t_cuda_memory" ;;
esac
[ "$TAP_EFFORT" != quick ] || programs="t_handoff t_combine t_capacity t_cuda_streams"
n=0
bad=0
for program in $programs; do
    n=$((n + 1))
    case $program in
    t_handoff | t_layout | t_mismatch) sms=64 ;; # whose groups ask for many, or may have them
    *) sms=16 ;;
    esac
    # shellcheck disable=SC2086
    if LD_LIBRARY_PATH=$PWD/$build/driver EP_TEST_DEVICE=cuda EP_TEST_DRIVER=1 EP_TEST_PAIRS=10 \
        EP_TEST_SMS=$sms \
        timeout -k 5 $((100 * ${TAP_TIMEOUT_SCALE:-1})) $TAP_PREFIX "$build/tests/$program" \
        >"$logs/$program.tap" 2>"$logs/$program.err"; then
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
