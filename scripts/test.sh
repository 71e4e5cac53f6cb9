#!/bin/sh
# SPDX-License-Identifier: MIT
# test.sh [TEST...]: the inner loop, which every commit passes: the plain test programs, or those
# that are named, with fewer cases and moments where there are many (TAP_EFFORT=quick) and without
# NVRTC; and the hand-offs under ThreadSanitizer where that build exists (make tsan makes it).
# Run by `make test`, which builds the programs. Last line: "N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MFLAGS MAKELEVEL
export TAP_EFFORT=quick EP_SEED="${EP_SEED:-1}"
mkdir -p build/logs
sums=build/logs/test.txt
start=$(date +%s)
scripts/run_tests.sh "" "$@" >"$sums"
grep -v '^plain: [0-9]* passed' "$sums"
tsan=
if [ -d build/tsan/obj ]; then
    case " $* " in "  " | *" t_handoff "*) tsan=1 ;; esac
fi
if [ -n "$tsan" ]; then
    if ${MAKE:-make} --no-print-directory "-j$(nproc 2>/dev/null || echo 2)" DEPS=0 VARIANT=tsan \
        build/tsan/tests/t_handoff >build/logs/test-tsan.txt 2>&1; then
        scripts/run_tests.sh tsan t_handoff >build/logs/test-tsan.txt
        grep -v '^tsan: [0-9]* passed' build/logs/test-tsan.txt
        cat build/logs/test-tsan.txt >>"$sums"
    else
        tail -20 build/logs/test-tsan.txt
        echo "tsan: 0 passed, 1 failed, 0 skipped" >>"$sums"
    fi
fi
echo "$(($(date +%s) - start)) s; the slowest:$(sort -rn build/logs/plain/times |
    awk 'NR <= 5 { printf "%s %s %s s", (NR > 1 ? "," : ""), $2, $1 }')"
awk '/: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ {
        p += $(NF - 5); f += $(NF - 3); s += $(NF - 1) }
    END { printf "%d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 }' "$sums"
