#!/bin/bash
# SPDX-License-Identifier: MIT
# check_gpu.sh [--quick]: the tests on the GPUs of this machine. Builds what it needs (no toolkit);
# run by `make check-gpu`. Parts, in this order; CHECK_GPU_PARTS="threads all" runs only those:
#
#   threads    ranks as threads of one process, on one GPU
#   processes  ranks as processes, on one GPU
#   all        rank r on GPU r, modulo their number: threads, then processes
#   sanitizer  compute-sanitizer's memcheck and synccheck, one rank, and ranks as processes
#   generic    threads, processes, all once more with DISABLE_SM90_FEATURES=1
#   python     tests/python with torch's CUDA tensors; PYTHON (python3) must have torch and pytest
#
# --quick takes under two minutes: of the first three parts the programs whose subject is no other's,
# threads and processes at the same time; the other parts only where they are named.
# Several programs run at a time on each GPU, as a process takes seconds to start there and hardly
# uses it then; those of class `timed` two at a time, and `exclusive` alone. All of it takes tens of
# minutes; with GPU_SECONDS=N what is not begun after N seconds is skipped.
# Output is in OUT (build/gpu): a folder of TAP for each part, gpu.log, summary.txt.
# The last line sums test points and steps: "N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
quick=$([ "$1" = --quick ] && echo 1)
out=${OUT:-build/gpu}
mkdir -p "$out" || exit 1
log=$out/gpu.log
summary=$out/summary.txt
: >"$log"
: >"$summary"
end=$((SECONDS + ${GPU_SECONDS:-1000000}))
failed=0
unset MAKEFLAGS MFLAGS MAKELEVEL

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# line WORD NAME SECONDS TEXT: one line of the summary.
line() { say "$(printf '%-5s %-40s %4d s  %s' "$1" "$2" "$3" "${4:0:160}")"; }

# step NAME SECONDS COMMAND...: status 0 is good, 77 skipped; its last line goes to the summary.
# Status 77 also when there is no time left.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((end - SECONDS)) rc word
    shift 2
    if [ $left -lt 10 ]; then
        line SKIP "$name" 0 "no time left"
        return 77
    fi
    [ "$limit" -lt $left ] || limit=$left
    printf '\n== %s: %s\n' "$name" "$*" >>"$log"
    timeout -k 5 "$limit" "$@" >"$out/step.txt" 2>&1 </dev/null
    rc=$?
    cat "$out/step.txt" >>"$log"
    echo "status $rc" >>"$log"
    case $rc in
    0) word=ok ;;
    77) word=SKIP ;;
    124 | 137) word=LATE ;;
    *) word=FAIL ;;
    esac
    [ $rc = 0 ] || [ $rc = 77 ] || failed=$((failed + 1))
    line $word "$name" $((SECONDS - start)) "$(grep -v '^$' "$out/step.txt" | tail -1)"
    if [ $rc != 0 ] && [ $rc != 77 ]; then
        grep -E 'FATAL|FAILED|WRONG|error:|fault:|abort word|^rank |^    rank|=========' \
            "$out/step.txt" | head -25 | cut -c1-220 | sed 's/^/        /' | tee -a "$summary"
    fi
    return $rc
}

nvrtc=${EP_NVRTC_PATH:-$(scripts/find.sh nvrtc)}
if [ -z "$nvrtc" ]; then # a wheel beside some Python's packages
    nvrtc=$(python3 -c '
import glob, site, sys
for d in site.getsitepackages() + sys.path:
    for f in sorted(glob.glob(d + "/nvidia/*/lib/libnvrtc.so.1[23]"), reverse=True):
        print(f)
        sys.exit()' 2>/dev/null)
fi
[ -n "$nvrtc" ] && export EP_NVRTC_PATH=$nvrtc # else programs look for themselves
sanitizer=$(command -v compute-sanitizer)
for f in /usr/local/cuda*/bin/compute-sanitizer \
    /usr/local/cuda*/compute-sanitizer/compute-sanitizer; do
    [ -z "$sanitizer" ] && [ -x "$f" ] && sanitizer=$f
done

# A caller's own choice of devices stays.
visible=()
if [ -n "$CUDA_VISIBLE_DEVICES" ]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
else
    for ((i = 0; i < $(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); i++)); do
        visible+=("$i")
    done
fi
devices=${#visible[@]}
jobs=$(($(nproc) / 3 / (devices > 0 ? devices : 1))) # programs that share a GPU
jobs=$((jobs < 1 ? 1 : jobs > 5 ? 5 : jobs))

# What this machine is, and a build of the make targets given.
machine() {
    step machine 60 sh -c 'nvidia-smi || exit 77; nvidia-smi topo -m
        nvidia-smi --query-gpu=index,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv
        gcc --version | head -1; nproc; uname -r; nvidia-smi -L'
    say "      NVRTC ${nvrtc:-to be found}; compute-sanitizer ${sanitizer:-none}; $devices devices"
}
build() { step build 300 make --no-print-directory -j"$(nproc)" DEPS=0 "$@"; }
export EP_SEED=${EP_SEED:-1}
sums=$out/sums
rm -rf "$sums"
mkdir -p "$sums"

parts=${CHECK_GPU_PARTS:-${quick:+threads processes all}}
wanted() { [[ -z $parts || " $parts " == *" $1 "* ]]; }

# What runs where ranks are threads, and what where they are processes; PROGRAM:SECONDS.
threads="t_handoff:60 t_layout:60 t_dispatch_compact:120 t_dispatch_expanded:120 t_combine:120
    t_rowtypes:120 t_determinism:90 t_cached:60 t_capacity:60 t_mismatch:90 t_begin_finish:60
    t_order:60 t_stats:60 t_args:60 t_args_operations:60 t_arena:90 t_many_ranks:90 t_abort:120
    t_random:180 t_cuda_graph:90 t_cuda_pointers:60 t_cuda_streams:90 t_cuda_order:60 t_cuda_handles:60 t_cuda_groups:60
    t_cuda_memory:60 t_grow:60 t_thread_end:90 t_cuda_suspend:60 t_ll:60 t_ll_order:60 t_ll_args:60 t_ll_graph:90
    t_ll_masks:60 t_cuda_device_end:90 t_cuda_soak:120"
processes="t_handoff:60 t_begin_finish:90 t_cached:90 t_capacity:90 t_stats:60 t_order:60
    t_args_operations:60 t_arena:120 t_mismatch:150 t_abort:150 t_killed:300 t_late:300 t_random:120
    t_many_ranks:120 t_cuda_graph:90 t_cuda_streams:120 t_cuda_order:60 t_cuda_handles:60
    t_cuda_memory:90 t_grow:120 t_ll:90 t_ll_order:90 t_ll_args:90 t_ll_graph:120 t_ll_masks:90
    t_cuda_device_end:120 t_cuda_soak:150"
cases=150 pairs=200       # of t_random and t_cuda_soak, threads
few_cases=8 few_pairs=30  # and processes, which take seconds to start
if [ -n "$quick" ]; then
    threads="t_combine:120 t_random:120 t_abort:120 t_cuda_graph:90 t_cuda_streams:90 t_ll:60 t_ll_order:60"
    processes="t_handoff:60 t_cuda_order:60 t_cuda_device_end:120"
    jobs=$(((jobs + 1) / 2)) # of either part: more wait for each other in the driver
    cases=40 pairs=40 few_cases=3 few_pairs=10
fi

# record NAME PASSED FAILED SKIPPED: for the last line.
record() { echo "$2 $3 $4" >"$sums/${1//\//-}"; }

# program PART NAME SECONDS [VARIABLE=VALUE...]: one test program, counted by its test points.
program() {
    local part=$1 name=$2 limit=$3 dir=$out/$1 start=$SECONDS left=$((end - SECONDS))
    local sum passed failed skipped word=ok text
    shift 3
    if [ $left -lt 15 ]; then
        line SKIP "$part $name" 0 "no time left"
        record "$part-$name" 0 0 1
        return
    fi
    [ "$limit" -lt $left ] || limit=$left
    mkdir -p "$dir"
    env EP_TEST_DEVICE=cuda TAP_LOGS="$dir" TAP_TIMEOUT="$limit" "$@" \
        scripts/run_tests.sh --one "build/tests/$name" >"$dir/$name.txt" 2>&1
    sum=$(cat "$dir/$name.sum" 2>/dev/null)
    read -r passed failed skipped <<<"${sum:-0 1 0}"
    text="$passed passed, $failed failed, $skipped skipped"
    if [ "$passed$failed" = 00 ]; then
        word=SKIP
        text=$(grep -m1 SKIP "$dir/$name.tap")
        if [[ $text == *"no CUDA device"* ]]; then # there is one: nvidia-smi has named it
            failed=1
            skipped=0
        fi
    fi
    [ "$failed" = 0 ] || word=FAIL
    record "$part-$name" "$passed" "$failed" "$skipped"
    line $word "$part $name" $((SECONDS - start)) "$text"
    if [ "$failed" != 0 ]; then
        {
            cat "$dir/$name.why"
            grep -B6 -A3 '^not ok' "$dir/$name.tap"
            grep '=========' "$dir/$name.tap"
            tail -5 "$dir/$name.err"
        } 2>/dev/null | head -30 | cut -c1-220 | sed 's/^/        /' | tee -a "$summary"
    fi
}

# worker PART PROGRAMS VARIABLE=VALUE...: takes programs that no other worker has taken.
worker() {
    local part=$1 list=$2 p
    shift 2
    for p in $list; do
        mkdir "$taken/${p%:*}" 2>/dev/null || continue
        program "$part" "${p%:*}" "${p#*:}" "$@"
    done
}

class_of() { sed -n '1,5s/.*class: \([a-z]*\).*/\1/p' "tests/$1.c"; }

classes="rest timed exclusive"

# at_once PART PROGRAMS VARIABLE=VALUE...: on each of the GPUs in the array `on`, or, where that has
# one entry, "", on all of them together. Programs that do not look at the clock have more time, as
# there are more at once.
at_once() {
    local part=$1 list=$2 class device p some i num under taken
    taken=$(mktemp -d) || exit 1
    shift 2
    for class in $classes; do
        some=
        for p in $list; do
            [ "$(class_of "${p%:*}")" = $class ] && some="$some $p"
        done
        case $class in
        rest) num=$jobs under=TAP_TIMEOUT_SCALE=2 ;;
        timed) num=2 under=TAP_TIMEOUT_SCALE=1 ;;
        *) num=1 under=TAP_TIMEOUT_SCALE=1 ;;
        esac
        for device in "${on[@]}"; do
            for ((i = 0; i < num; i++)); do
                worker "$part" "$some" "$under" "$@" \
                    ${device:+CUDA_VISIBLE_DEVICES="$device" EP_TEST_ONE_GPU=1} &
            done
        done
        wait
    done
    rm -rf "$taken"
}

on_one() {
    local on=("${visible[@]}")
    at_once "$@"
}

on_all() {
    local on=("")
    at_once "$@"
}

# both WHERE THREADS PROCESSES: the programs of these two parts, of which one may be "". In a quick run
# at the same time, but for those that look at the clock.
both() {
    local stages=("$classes") classes
    [ -z "$quick" ] || read -r -a stages <<<"${stages[0]}"
    for classes in "${stages[@]}"; do
        [ -z "$2" ] || "$1" "$2" "$threads" "${as_threads[@]}" &
        [ -n "$quick" ] || wait
        [ -z "$3" ] || "$1" "$3" "$processes" "${as_processes[@]}" &
        wait
    done
}

# everything SUFFIX VARIABLE=VALUE...: those of the parts threads, processes and all that are
# wanted, or all of them.
everything() {
    local suffix=$1 as_threads as_processes
    shift
    as_threads=(EP_TEST_RANKS=threads EP_CASES="$cases" EP_TEST_PAIRS="$pairs" "$@")
    as_processes=(EP_TEST_RANKS=processes EP_CASES="$few_cases" EP_TEST_PAIRS="$few_pairs" "$@")
    if [ -z "$suffix$quick" ] && wanted threads; then
        on_one threads-pinned "t_combine:120 t_random:120" "${as_threads[@]}" \
            EP_TEST_MEMORY=pinned &
    fi
    both on_one "$([ -z "$suffix" ] && ! wanted threads || echo "threads$suffix")" \
        "$([ -z "$suffix" ] && ! wanted processes || echo "processes$suffix")"
    if [ -z "$suffix" ] && ! wanted all; then
        return
    fi
    if [ "$devices" -lt 2 ]; then
        line SKIP "all$suffix" 0 "several GPUs: $devices here"
        record "all$suffix" 0 0 1
        return
    fi
    both on_all "all-threads$suffix" "all-processes$suffix"
}

# The tools may run the kernels of a process one after the other: ranks that wait for each other
# are processes.
sanitize() {
    local tool prefix under
    if [ -z "$sanitizer" ]; then
        line SKIP sanitizer 0 "compute-sanitizer is not here"
        record sanitizer 0 0 1
        return
    fi
    for tool in memcheck synccheck; do
        prefix="$sanitizer --tool $tool --error-exitcode 9 --target-processes all"
        under=(TAP_PREFIX="$prefix" TAP_TIMEOUT_SCALE=6 EP_TEST_ONE_GPU=1 EP_TEST_MEMORY=exact
            EP_TEST_PAIRS=7)
        program "$tool-one-rank" t_cuda_soak 30 "${under[@]}" EP_TEST_RANKS=threads \
            EP_TEST_NUM_RANKS=1
        program "$tool-processes" t_handoff 30 "${under[@]}" EP_TEST_RANKS=processes
        [ -n "$quick" ] || program "$tool-processes" t_cuda_soak 30 "${under[@]}" \
            EP_TEST_RANKS=processes EP_TEST_NUM_RANKS=2
    done
}

python() {
    local sum
    step python 900 env EP_TEST_DEVICE=cuda PYTHON="${PYTHON:-python3}" scripts/python.sh tests/python
    if [ $? = 77 ]; then
        record python 0 0 1
        return
    fi
    sum=$(sed -n '$s/^python: //p' "$out/step.txt" | tr -dc '0-9 ')
    record python ${sum:-0 1 0} # three numbers
}

machine
if [ "$devices" = 0 ]; then
    say "no GPU here"
    say "0 passed, 0 failed, 1 skipped"
    exit 0
fi
build tests || { say "0 passed, 1 failed, 0 skipped"; exit 1; }
everything ""
if wanted sanitizer; then sanitize; fi
if wanted generic; then
    if [ -n "$quick" ]; then
        threads="t_handoff:60 t_combine:120 t_random:120"
        processes="t_handoff:60"
    fi
    everything -generic DISABLE_SM90_FEATURES=1
fi

if wanted python; then python; fi

rm -f "$out/step.txt"
say "$SECONDS s; logs in $out"
cat "$sums"/* | awk '{ p += $1; f += $2; s += $3 }
    END { printf "%d passed, %d failed, %d skipped\n", p, f, s }' | tee -a "$summary"
grep -q '^[0-9]* [1-9]' "$sums"/* && exit 1
exit 0
