#!/bin/bash
# SPDX-License-Identifier: MIT
# model.sh: the protocol of low-latency mode, checked for every order of events (tests/model), and
# variants of it with one rule taken away, each of which must be caught. SOAK=1: larger cases, minutes.
# Needs spin and a C compiler. Last line: "model: N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
if ! command -v spin >/dev/null; then
    echo "skip: spin is not installed"
    echo "model: 0 passed, 0 failed, 1 skipped"
    exit 0
fi
out=$PWD/build/model
mkdir -p "$out"
passed=0
failed=0

# search NAME MODEL DEFINE...: every state; what was found is in $out/NAME/pan.txt.
search() {
    local dir=$out/$1 model=$PWD/tests/model/$2
    shift 2
    rm -rf "$dir"
    mkdir -p "$dir"
    cd "$dir" || return
    cp "$model" model.pml # spin writes the trail beside it
    if spin -a "$@" model.pml >spin.txt 2>&1 && ${CC:-gcc} $optimised -w -DSAFETY -DCOLLAPSE -o pan pan.c; then
        timeout 900 ./pan -m1000000 -w22 >pan.txt 2>&1
    fi
}
# As many at a time as there are cores.
all=()
start() { # start holds|is_caught NAME MODEL DEFINE...
    all+=("$*")
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    shift
    (search "$@") &
}
report() { # report holds|is_caught NAME MODEL DEFINE...
    local want=$1 name=$2 pan=$out/$2/pan.txt errors
    errors=$(sed -n 's/.*errors: \([0-9]*\).*/\1/p' "$pan" 2>/dev/null)
    # A search that was cut short has found nothing.
    if [ "$want$errors" = holds0 ] && ! grep -Eq 'search depth too small|out of memory|interrupted' "$pan"; then
        echo "ok: $name holds in $(sed -n 's/ *\([0-9.e+]*\) states, stored.*/\1/p' "$pan") states"
    elif [ "$want" = is_caught ] && [ "${errors:-0}" != 0 ]; then
        echo "ok: $name is caught: $(sed -n 's/^pan:1: \([a-z ]*\).*/\1/p' "$pan")"
    else
        cat "$out/$name/spin.txt" "$pan" 2>/dev/null | head -20
        echo "$name: must be: $want. How: cd build/model/$name && spin -t -p -g ${*:4} model.pml"
        failed=$((failed + 1))
        return
    fi
    passed=$((passed + 1))
}

optimised=${SOAK:+-O2}
start holds three_ranks_one_is_paused ll.pml -DRANKS=3 -DOPS=1 -DMORE=1 -DPAUSES=1 -DHALVES_ONLY -DWHO=2
start holds three_ranks ll.pml -DRANKS=3 -DOPS=3 -DMORE=0 -DHALVES_ONLY
start holds two_ranks ll.pml -DRANKS=2 -DOPS=5 -DMORE=0
start holds two_ranks_one_is_paused ll.pml -DRANKS=2 -DOPS=2 -DMORE=1 -DPAUSES=1
start holds packets ll.pml -DRANKS=2 -DOPS=5 -DMORE=0 -DPACKETS
start holds packets_one_is_paused ll.pml -DRANKS=2 -DOPS=2 -DMORE=1 -DPAUSES=1 -DPACKETS
start holds weights ll.pml -DRANKS=2 -DOPS=4 -DMORE=0 -DWEIGHTS
start holds weights_one_is_paused ll.pml -DRANKS=2 -DOPS=2 -DMORE=1 -DPAUSES=1 -DWEIGHTS
start holds verdict ll_verdict.pml
if [ -n "$SOAK" ]; then
    start holds two_ranks_long ll.pml -DRANKS=2 -DOPS=4 -DMORE=3 -DPAUSES=1
    start holds three_ranks_any_is_paused ll.pml -DRANKS=3 -DOPS=1 -DMORE=1 -DPAUSES=1
    start holds two_pauses ll.pml -DRANKS=2 -DOPS=2 -DMORE=2 -DPAUSES=2
fi
start is_caught no_consumed_word ll.pml -DNO_CONSUMED -DOPS=3 -DMORE=0
start is_caught packets_without_consumed_word ll.pml -DPACKETS -DNO_CONSUMED -DOPS=3 -DMORE=0
start is_caught wrong_parity ll.pml -DWRONG_PARITY -DOPS=3 -DMORE=0
start is_caught word_before_row ll.pml -DWORD_FIRST -DOPS=1 -DMORE=0
start is_caught two_writers_of_a_place ll.pml -DTWO_WRITERS -DOPS=1 -DMORE=0
start is_caught weights_behind_the_waits ll.pml -DWEIGHTS -DWEIGHTS_LAST -DOPS=1 -DMORE=0
start is_caught unmask_without_barrier ll.pml -DUNMASK_ALONE -DOPS=2 -DMORE=1 -DPAUSES=1
start is_caught barrier_left_without_an_answer ll.pml -DLEAVE_EARLY -DOPS=1 -DMORE=1
start is_caught verdict_without_pending ll_verdict.pml -DNO_PENDING
start is_caught verdict_without_a_second_look ll_verdict.pml -DNO_SECOND_LOOK
start is_caught verdict_before_counts ll_verdict.pml -DVERDICT_FIRST
wait
for one in "${all[@]}"; do
    # shellcheck disable=SC2086
    report $one
done
echo "model: $passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
