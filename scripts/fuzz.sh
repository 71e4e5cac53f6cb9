#!/bin/sh
# SPDX-License-Identifier: MIT
# fuzz.sh: runs each libFuzzer program of build/fuzz for FUZZ_SECONDS (60) on its corpus
# tests/corpus/NAME. New inputs stay in build/fuzz/corpus; a crash is left in build/fuzz.
# fuzz.sh replay: feeds the corpus, and FUZZ_MUTANTS seeded mutants of each file of it, to the
# programs of build/san; 2000, or as many as a line "mutants: N" in a fuzzer's head says. Last line: "fuzz: N passed, N failed, N skipped".
# With --one replay|fuzz NAME it runs that one.
cd "$(dirname "$0")/.." || exit 1
mkdir -p build/logs

if [ "$1" = --one ]; then
    name=$3
    corpus=tests/corpus/$name
    log=build/logs/$name.txt
    if [ "$2" = replay ]; then
        mutants=$(sed -n '1,20s/.*mutants: \([0-9]*\).*/\1/p' "tests/$name.c")
        mutants=${FUZZ_MUTANTS:-${mutants:-2000}}
        # shellcheck disable=SC2046
        timeout -k 5 120 "build/san/tests/$name" "$mutants" \
            $(ls "$corpus"/* 2>/dev/null) >"$log" 2>&1 </dev/null
    else
        mkdir -p "build/fuzz/corpus/$name" "$corpus"
        "build/fuzz/tests/$name" -max_total_time="${FUZZ_SECONDS:-60}" -timeout=10 \
            -artifact_prefix="build/fuzz/$name-" "build/fuzz/corpus/$name" "$corpus" \
            >"$log" 2>&1 </dev/null
    fi
    if [ $? = 0 ]; then
        echo "ok: $name: $(tail -1 "$log")"
    else
        tail -15 "$log"
        echo "$name: FAILED, see $log"
    fi
    exit 0
fi
# Corpora are replayed on all cores; fuzzers, whose pace matters, run one after the other.
jobs=1
[ "$1" != replay ] || jobs=$(nproc 2>/dev/null || echo 2)
all=$(basename -s .c tests/fuzz_*.c)
said=$(echo "$all" | xargs -P "$jobs" -n 1 sh scripts/fuzz.sh --one "${1:-fuzz}")
echo "$said"
passed=$(echo "$said" | grep -c '^ok: ')
failed=$(($(echo "$all" | wc -l) - passed))
echo "fuzz: $passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
