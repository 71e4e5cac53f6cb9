#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest, long
# The program `ep` with GPUs, on the driver for tests (tests/driver). TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

if ! [ -e "$build/driver/libcuda.so.1" ]; then
    echo "1..0 # SKIP the driver for tests is not built"
    exit 0
fi
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
    has '^goal: 22 us ' &&
    [ "$(grep -c '  eager  ' "$tmp/out")" = 14 ] && [ "$(grep -c '  graph  ' "$tmp/out")" = 14 ]
ok "bench --device cuda checks its data, eager and as a graph"
# shellcheck disable=SC2086
cuda 0 "$ep" bench --device cuda --mode ll $tiny --tokens 4 --dtype fp8 --workers 1 --iters 1 \
    --warmup 0 && has 'data checked' && has '^link: [0-9]' && has '^bf16 combine, receive half  ' &&
    [ "$(grep -c '  eager  ' "$tmp/out")" = 12 ] && [ "$(grep -c '  graph  ' "$tmp/out")" = 12 ]
ok "bench --device cuda --mode ll checks its data, eager and as a graph"
cuda 0 "$ep" demo --device cuda -n 2 --tokens 60 --batch 16 && has PASS &&
    has '2 processes' && has 'rows are on 1 x a device for tests, 0'
ok "demo --device cuda passes"
echo "1..$n"
