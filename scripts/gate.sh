#!/bin/sh
# SPDX-License-Identifier: MIT
# gate.sh: every kernel by NVRTC and nvcc for every GPU generation, several at once, the gate's own
# proof that it refuses what it must, and the library cross-compiled for aarch64. Needs no GPU.
# GATE_NVCC_ARCHS="90" leaves nvcc that one: make check does, because NVRTC is the same compiler.
# Run by `make gate`, which builds build/gate. Last line: "gate: N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
mkdir -p build/logs
sum=build/logs/gate.sum
: >"$sum"
count() { echo "$1 $2 $3" >>"$sum"; } # passed failed skipped
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
: >"$tmp/all"
archs="80 90 100 120"
nvcc_archs=${GATE_NVCC_ARCHS:-$archs}

# Plants: a kernel that spills, one that does not compile, a trailing attribute that NVRTC
# would drop in silence, a header that was not registered. Each must be refused.
self_test() { # self_test nvrtc|nvcc PATH
    mkdir -p "$tmp/kernel"
    planted=0
    plant() {
        printf '%s\n' "$3" >"$tmp/kernel/plant.k.c"
        if (cd "$tmp" && "$OLDPWD/build/gate" "$1" "$2" 90 kernel/plant.k.c) >"$tmp/out" 2>&1; then
            echo "gate self-test: $1 accepted: $3"
            count 0 1 0
        else
            planted=$((planted + 1))
            count 1 0 0
        fi
    }
    plant "$1" "$2" 'extern "C" __global__ void spill(unsigned *p, int n) {
    unsigned a[64];
    for (int i = 0; i < 64; i++) { a[i] = p[i]; }
    for (int i = 0; i < n; i++) { a[p[i] & 63] += i; }
    for (int i = 0; i < 64; i++) { p[i] = a[i]; }
}'
    plant "$1" "$2" 'extern "C" __global__ void broken(unsigned *p) { *p = undeclared; }'
    plant "$1" "$2" '#include "kernel/absent.h"
extern "C" __global__ void empty(void) {}'
    [ "$1" = nvrtc ] && plant "$1" "$2" 'struct a { char x; } __attribute__((aligned(16)));
extern "C" __global__ void sizes(unsigned *p) { *p = sizeof(struct a); }'
    # What is good must pass, or the refusals above prove nothing.
    printf '%s\n' 'extern "C" __global__ void good(unsigned *p) { *p = 1; }' \
        >"$tmp/kernel/plant.k.c"
    if (cd "$tmp" && "$OLDPWD/build/gate" "$1" "$2" 90 kernel/plant.k.c) >"$tmp/out" 2>&1; then
        count 1 0 0
    else
        cat "$tmp/out"
        echo "gate self-test: $1 refused a good kernel"
        count 0 1 0
    fi
    echo "gate self-test: $1 refused $planted plants"
}

kernels=$(ls kernel/*.k.c 2>/dev/null)
nvrtc=$(scripts/find.sh nvrtc)
nvcc=$(scripts/find.sh nvcc)
for what in nvrtc nvcc; do
    path=$nvrtc
    [ $what = nvcc ] && path=$nvcc
    if [ -z "$path" ]; then
        echo "skip: no $what here and no package of it"
        count 0 0 1
        continue
    fi
    case $path in /*) ;; *) path=$PWD/$path ;; esac
    self_test $what "$path"
    [ -n "$kernels" ] || { echo "$what: no kernel/*.k.c yet"; continue; }
    which=$archs
    [ $what = nvcc ] && which=$nvcc_archs
    for arch in $which; do
        for kernel in $kernels; do
            echo "$what $path $arch $kernel"
        done
    done >>"$tmp/all"
done
if [ -s "$tmp/all" ]; then
    xargs -P "$(nproc 2>/dev/null || echo 2)" -n 4 \
        sh -c 'build/gate "$@" >"$0/$1-$3-$(basename "$4")" 2>&1' "$tmp" <"$tmp/all"
fi
while read -r what path arch kernel; do
    out=$tmp/$what-$arch-$(basename "$kernel")
    grep -v "^gate-$what:\|^nvrtc [0-9]" "$out"
    line=$(sed -n "s/^gate-$what: \([0-9]*\) passed, \([0-9]*\) failed.*/\1 \2 0/p" "$out")
    # shellcheck disable=SC2086
    count ${line:-0 1 0}
done <"$tmp/all"

if command -v aarch64-linux-gnu-gcc >/dev/null; then
    if make --no-print-directory VARIANT=aarch64 OPT=-O1 KERNEL_OPT=-O1 lib >build/logs/aarch64.txt 2>&1; then
        echo "aarch64: $(file -bL build/aarch64/libep.so 2>/dev/null || echo built)"
        count 1 0 0
    else
        grep -E 'error|Error|undefined' build/logs/aarch64.txt | head -10
        echo "aarch64: FAILED, see build/logs/aarch64.txt"
        count 0 1 0
    fi
else
    echo "skip: no aarch64-linux-gnu-gcc"
    count 0 0 1
fi
awk '{ p += $1; f += $2; s += $3 }
    END { printf "gate: %d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 }' "$sum"
