#!/bin/bash
# SPDX-License-Identifier: MIT
# gpu.sh [--quick]: everything that is to be learnt on a machine with NVIDIA GPUs, in one run.
# Builds build/cuda_try; checks the kernels on one device (one rank, four ranks, other shapes of
# launch, the generic mover, compute-sanitizer) and on several; measures. A step that fails does
# not stop the others. Needs a driver, NVRTC and gcc; no toolkit.
#
# Writes OUT/gpu.log (all output), OUT/timing.txt (tables), OUT/summary.txt; OUT is build/gpu
# unless set. GPU_SECONDS (540) bounds the whole run: late steps are cut short or skipped.
# Status 0 when no step failed.
cd "$(dirname "$0")/.." || exit 1
quick=
[ "$1" = --quick ] && quick=1
out=${OUT:-build/gpu}
mkdir -p "$out" || exit 1
log=$out/gpu.log
timing=$out/timing.txt
summary=$out/summary.txt
: >"$log"
: >"$timing"
: >"$summary"
end=$((SECONDS + ${GPU_SECONDS:-540}))
failed=0

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: status 0 is good, 77 skipped; the last line goes to the summary.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((end - SECONDS)) rc word
    shift 2
    if [ $left -lt 10 ]; then
        say "SKIP  $name: no time left"
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
    say "$(printf '%-5s %-28s %4d s  status %-3d %s' $word "$name" $((SECONDS - start)) $rc \
        "$(grep -v '^$' "$out/step.txt" | tail -1 | cut -c1-160)")"
    if [ $rc != 0 ] && [ $rc != 77 ]; then
        grep -E 'FATAL|FAILED|WRONG|fault:|abort word|^rank |^    rank|=========' "$out/step.txt" |
            head -25 | cut -c1-220 | sed 's/^/        /' | tee -a "$summary"
    fi
    return $rc
}

# measure NAME SECONDS COMMAND...: the same; the table is kept.
measure() {
    local rc
    step "$@"
    rc=$?
    { echo "== $1: ${*:3}"; grep -vE '^(ok  |FAILED)' "$out/step.txt"; } >>"$timing"
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
[ -n "$nvrtc" ] && export EP_NVRTC_PATH=$nvrtc # else the program looks for itself
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer \
    /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -1)
devices=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
try=build/cuda_try

step machine 60 sh -c 'nvidia-smi || exit 77; nvidia-smi topo -m
    nvidia-smi --query-gpu=index,clocks.sm,clocks.max.sm,clocks.mem,power.limit --format=csv
    gcc --version | head -1; nproc; uname -r; nvidia-smi -L'
say "      NVRTC ${nvrtc:-to be found}; compute-sanitizer ${sanitizer:-none}; $devices devices"
step build 240 make -j"$(nproc)" DEPS=0 $try || { say "nothing can be run"; exit 1; }

seeds=12
[ -n "$quick" ] && seeds=3
step one-rank 60 $try --ranks 1 --seeds 2
step four-ranks 120 $try --seeds $seeds
step four-ranks-generic 120 $try --seeds $seeds --mover generic

# blocks:send:warps:stages:stageKiB. 16 blocks of 8 warps first; then rows in one piece, more
# blocks, other splits, many warps.
sweep=16:8:8:3:8,16:8:5:3:14,24:8:8:3:8
[ -z "$quick" ] && sweep=$sweep,8:4:8:3:8,16:6:8:3:8,16:10:8:3:8,24:12:8:3:8,32:8:8:3:8,\
32:16:8:3:8,24:8:5:3:14,24:16:5:3:14,32:8:5:3:14,16:8:7:2:14,16:8:8:6:4,16:8:16:3:4,24:8:16:3:4,\
24:8:16:2:6,32:16:16:3:4
if [ "$devices" -ge 2 ]; then
    most=$devices
    [ "$most" -le 8 ] || most=8
    step two-gpus 90 $try --multi-gpu --ranks 2 --seeds $seeds
    if [ "$most" -gt 2 ]; then
        step all-gpus 120 $try --multi-gpu --ranks $most --seeds $seeds
    fi
    step all-gpus-generic 120 $try --multi-gpu --ranks $most --seeds 3 --mover generic
    measure time 300 $try --multi-gpu --ranks $most --no-checks --sweep $sweep
    if [ -z "$quick" ]; then
        measure time-generic 90 $try --multi-gpu --ranks $most --no-checks --mover generic \
            --sweep 16:8:16:2:1,24:8:16:2:1
        measure time-two 90 $try --multi-gpu --ranks 2 --no-checks --sweep 16:8:8:3:8,16:8:5:3:14
    fi
else
    say "SKIP  several GPUs: $devices here"
    measure time-one-gpu 150 $try --no-checks --sweep 16:8:8:3:8,16:8:5:3:14,32:16:8:3:8
fi

step wide-blocks 90 $try --blocks 5 --send 2 --warps 16 --stages 2 --stage-bytes 4096 --seeds 2
if [ -z "$quick" ]; then
    step one-block 90 $try --blocks 1 --warps 4 --stages 4 --stage-bytes 2048 --seeds 2
    step all-stages 90 $try --blocks 32 --send 20 --warps 4 --stages 8 --stage-bytes 1024 --seeds 2
    step eight-ranks 90 $try --ranks 8 --blocks 12 --send 5 --seeds 2
fi

# The tools may run kernels one after the other; one rank waits for nobody, so it is the proof.
# With two ranks a timeout in phase "ready" only says that the tool did so.
tiny="--tokens 20 --hidden 256 --experts 16 --topk 4 --blocks 3 --send 1 --warps 2
    --stage-bytes 256 --seeds 0 --timeout-ms 20000"
if [ -n "$sanitizer" ]; then
    for tool in memcheck synccheck; do
        # shellcheck disable=SC2086
        step $tool 150 "$sanitizer" --tool $tool --error-exitcode 9 $try --ranks 1 $tiny
    done
    if [ -z "$quick" ]; then
        # shellcheck disable=SC2086
        step memcheck-generic 120 "$sanitizer" --tool memcheck --error-exitcode 9 $try --ranks 1 \
            $tiny --mover generic
        # shellcheck disable=SC2086
        step memcheck-two-ranks 60 "$sanitizer" --tool memcheck --error-exitcode 9 $try \
            --ranks 2 $tiny --timeout-ms 5000
    fi
else
    say "SKIP  compute-sanitizer: not here"
fi

rm -f "$out/step.txt"
printf '\n'
grep -E '\| (right|WRONG)' "$timing" | cut -c1-150
say "$failed steps failed; all output in $log, tables in $timing, this in $summary"
[ $failed = 0 ]
