#!/bin/bash
# SPDX-License-Identifier: MIT
# check.sh: everything a change must pass, in order, each step under its heading. Output is kept
# in build/logs; what fails shows its end here. Run by `make check`, which installs what is
# missing. CHECK_STEPS="law plain" runs only the steps whose names are given.
# At the end: what each step took, and the slowest ten programs. The last line sums test points and
# steps: "N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
unset MAKEFLAGS MFLAGS MAKELEVEL
export DEPS=0
export CC=gcc # sanitizers and gcov are gcc's; clang has its own step
# A fixed sample: what check tries does not change from run to run. Soak varies the seed.
export EP_SEED=${EP_SEED:-1}
logs=build/logs
mkdir -p $logs
cores=$(nproc 2>/dev/null || echo 2)
passed=0
failed=0
skipped=0
failures=()
begin=$SECONDS

times=$logs/steps.txt # SECONDS NAME
: >$times

heading() { printf '\n== %s\n' "$1"; }
wanted() { [[ -z $CHECK_STEPS || " $CHECK_STEPS " == *" $1 "* ]]; }
build() { make --no-print-directory -k -j"$cores" "$@"; }

# step NAME HEADING COMMAND...: one step, good at status 0, skipped at 77.
step() {
    local name=$1 log=$logs/$1.txt start=$SECONDS rc
    wanted "$name" || return 0
    heading "$2"
    shift 2
    "$@" >"$log" 2>&1 </dev/null
    rc=$?
    echo "$((SECONDS - start)) $name" >>$times
    if [[ $rc == 0 ]]; then
        passed=$((passed + 1))
        grep -E '^(ok|skip|coverage):' "$log"
        echo "passed ($((SECONDS - start)) s)"
    elif [[ $rc == 77 ]]; then
        skipped=$((skipped + 1))
        tail -1 "$log"
    else
        failed=$((failed + 1))
        failures+=("$name")
        tail -40 "$log"
        echo "FAILED: all of it in $log ($((SECONDS - start)) s)"
    fi
    return $rc
}

# counted NAME HEADING COMMAND...: its last line says "...: N passed, N failed, N skipped".
counted() {
    local name=$1 log=$logs/$1.txt start=$SECONDS rc line
    wanted "$name" || return 0
    heading "$2"
    shift 2
    "$@" >"$log" 2>&1 </dev/null
    rc=$?
    echo "$((SECONDS - start)) $name" >>$times
    line=$(tail -1 "$log")
    if [[ $line =~ ([0-9]+)\ passed,\ ([0-9]+)\ failed,\ ([0-9]+)\ skipped$ ]]; then
        passed=$((passed + BASH_REMATCH[1]))
        failed=$((failed + BASH_REMATCH[2]))
        skipped=$((skipped + BASH_REMATCH[3]))
        if [[ $rc != 0 && ${BASH_REMATCH[2]} == 0 ]]; then
            failed=$((failed + 1))
        fi
    else
        failed=$((failed + 1))
        rc=1
    fi
    [[ $rc == 0 ]] || failures+=("$name")
    tail -60 "$log"
    echo "($((SECONDS - start)) s)"
}

run_examples() {
    local bad=0 example
    for example in examples/*.c; do
        [[ -e $example ]] || { echo "skip: no examples yet"; return 77; }
        example=build/examples/$(basename "$example" .c)
        if timeout -k 5 60 "$example"; then
            echo "ok: $example"
        else
            echo "$example: status $?"
            bad=1
        fi
    done
    return $bad
}
run_demo() {
    ls tools/*.c >/dev/null 2>&1 || { echo "skip: no tools yet"; return 77; }
    timeout -k 5 60 build/ep demo && echo "ok: ep demo"
}

step fmt 'format' make --no-print-directory fmt-check
step law 'layer law' scripts/law.sh
step law-self-test 'layer law: planted violations are caught' scripts/law.sh --self-test
step build-gcc 'build with gcc' build build-all tests
# It is not run: what clang has to say it says before it optimizes.
step build-clang 'build with clang' build VARIANT=clang OPT=-O0 KERNEL_OPT=-O0 build-all tests
step headers 'ep.h alone: C99, C11, C++17, cffi' scripts/headers.sh
step exports 'exported symbols' scripts/exports.sh build/libep.so
counted plain 'tests' scripts/run_tests.sh
counted python 'the Python package' scripts/python.sh
step example 'examples' run_examples
step demo 'ep demo' run_demo
step build-san 'build with AddressSanitizer, UndefinedBehaviorSanitizer and coverage' \
    build VARIANT=san tests fuzzers
if wanted san; then
    find build/san -name '*.gcda' -delete 2>/dev/null
fi
counted san 'tests under AddressSanitizer and UndefinedBehaviorSanitizer' \
    scripts/run_tests.sh san
step coverage 'line coverage of these' scripts/cov.sh san
step build-tsan 'build with ThreadSanitizer and late movers' build VARIANT=tsan tests
counted tsan 'tests under ThreadSanitizer' scripts/run_tests.sh tsan
counted must-fail 'tests that must fail' scripts/must_fail.sh
counted model 'the protocol of low-latency mode, every order of events' scripts/model.sh
counted fuzz 'fuzzers: corpus and seeded mutants' scripts/fuzz.sh replay
step build-gate 'build the gate' build build/gate
counted gate 'gate: kernels for every GPU generation, aarch64' \
    env GATE_NVCC_ARCHS=90 scripts/gate.sh

heading 'the slowest ten programs: seconds, name, seconds of CPU'
for variant in plain san tsan; do
    wanted $variant && sed "s/ / $variant /" $logs/$variant/times
done 2>/dev/null | sort -rn | head -10
heading 'result'
echo "$((SECONDS - begin)) s: $(sort -rn $times |
    awk '$1 > 0 { printf "%s%s %d", (NR > 1 ? ", " : ""), $2, $1 }'); logs in $logs"
[[ ${#failures[@]} == 0 ]] || echo "failed: ${failures[*]}"
# What failed is said again where the end of a long output is all that is kept.
for variant in plain san tsan; do
    wanted $variant || continue
    cat $logs/$variant/*.why 2>/dev/null
    grep -H '^not ok' $logs/$variant/*.tap 2>/dev/null | grep -v '# TODO' |
        sed "s|^$logs/||" | head -10
done
echo "$passed passed, $failed failed, $skipped skipped"
[[ $failed == 0 ]]
