#!/bin/sh
# SPDX-License-Identifier: MIT
# run_tests.sh [VARIANT [TEST...]]: runs the test programs of a variant ("" is the plain one)
# under prove, each under a hard limit, and counts their test points. A line "class: NAME" in the
# head of a test says with whom it runs:
#   exclusive   nobody: its bounds on time mean nothing beside others, or others' beside it
#   timed       others of its class, several at once: it mostly sleeps
#   rest        others of its class, one more at once than there are cores
# "class: rest, long" or "timed, long": it begins first, so that it does not end long after the others, and
# its limit is twice as long.
# The last line is "VARIANT: N passed, N failed, N skipped"; build/logs/VARIANT holds it all, and
# in the file times a line "SECONDS NAME CPU-SECONDS" for each program. A program that is neither
# long nor exclusive should take under 20 seconds; when all tests of the plain build run, one that
# takes twice as long (TAP_LIMIT seconds) fails, so that a slow day of the machine fails none.
# With --one PROGRAM it is what prove calls for each program.
cd "$(dirname "$0")/.." || exit 1

class_of() { # class_of PROGRAM
    case $1 in
    *.sh | *.py) head=$1 ;;
    *) head=tests/$(basename "$1").c ;;
    esac
    sed -n '1,5s/.*class: \([a-z]*\(, long\)*\).*/\1/p' "$head"
}

if [ "$1" = --one ]; then
    prog=$2
    name=$(basename "$prog")
    out=$TAP_LOGS/$name.tap
    err=$TAP_LOGS/$name.err
    limit=$((${TAP_TIMEOUT:-120} * ${TAP_TIMEOUT_SCALE:-1}))
    case $(class_of "$prog") in *long) limit=$((2 * limit)) ;; esac
    case $prog in
    *.sh) set -- sh "$prog" ;;
    *.py) set -- python3 "$prog" ;;
    *) set -- $TAP_PREFIX "$prog" ;;
    esac
    # What a program that is killed leaves behind goes with its folder.
    TMPDIR=$(mktemp -d) || exit 1
    export TMPDIR
    bound=$TAP_BOUND
    case $(class_of "$prog") in *long | exclusive) bound= ;; esac
    start=$(date +%s%N)
    timeout -k 5 "$limit" "$@" >"$out" 2>"$err" </dev/null
    rc=$?
    rm -rf "$TMPDIR"
    took=$((($(date +%s%N) - start) / 1000000))
    times >"$out.cpu" # a shell's children's are lost in a pipe
    cpu=$(awk 'NR == 2 {
        split($0, t, /[ms ]+/); printf "%.1f", (t[1] + t[3]) * 60 + t[2] + t[4] }' "$out.cpu")
    rm -f "$out.cpu"
    why=
    plan=$(sed -n 's/^1\.\.\([0-9]*\).*/\1/p' "$out" | head -1)
    points=$(grep -cE '^(not )?ok\>' "$out")
    if grep -q '^Bail out!' "$out"; then
        why=$(grep '^Bail out!' "$out" | head -1)
    elif [ $rc = 124 ] || [ $rc = 137 ]; then
        why="killed after $limit s"
    elif [ -z "$plan" ]; then
        why="ended with status $rc before its plan"
    elif [ "$plan" != "$points" ]; then
        why="planned $plan test points, gave $points"
    elif [ $rc != 0 ] && ! grep -q '^not ok' "$out"; then
        why="ended with status $rc although no test point failed"
    elif grep -Eq '(WARNING|ERROR): [A-Za-z]+Sanitizer|runtime error:' "$err"; then
        why="a sanitizer reported"
    elif [ -n "$bound" ] && [ $took -gt $((bound * 1000)) ]; then
        why="took $((took / 1000)) s; a program that is not long may take $bound s"
    else
        # A warning that the test did not announce fails it.
        sed -n 's/^# expect-log: //p' "$out" >"$out.expect"
        if [ -s "$out.expect" ]; then
            surprise=$(grep -E '^libep: (warn|error):' "$err" | grep -v -F -f "$out.expect")
        else
            surprise=$(grep -E '^libep: (warn|error):' "$err")
        fi
        rm -f "$out.expect"
        [ -z "$surprise" ] || why="logged: $(echo "$surprise" | head -1)"
    fi
    # TODO points count as skipped; what the program did not number is one more point.
    awk -v why="$why" '
        /^not ok/ && !/# TODO/ { failed++; next }
        /^(not )?ok.*# (SKIP|TODO)/ { skipped++; next }
        /^ok/ { passed++ }
        /^1\.\.0/ { skipped++ }
        END { print passed + 0, failed + (why != ""), skipped + 0 }' "$out" >"$TAP_LOGS/$name.sum"
    # What prove sees: the program's own TAP, and the verdict above through the status. One
    # program that bails out must not keep prove from running the others.
    sed 's/^Bail out!/# &/' "$out"
    if [ -n "$why" ]; then
        echo "# $name: $why"
        echo "$name: $why" >"$TAP_LOGS/$name.why"
        tail -20 "$err" | sed 's/^/# /'
        [ $rc != 0 ] || rc=1
    fi
    echo "$((took / 1000)).$((took / 100 % 10)) $name $cpu" >>"$TAP_LOGS/times"
    exit $rc
fi

variant=$1
[ $# -gt 0 ] && shift
dir=build${variant:+/$variant}
TAP_BUILD=$dir
TAP_LOGS=build/logs/${variant:-plain}
rm -rf "$TAP_LOGS"
mkdir -p "$TAP_LOGS"
: >"$TAP_LOGS/times"
case $variant in
tsan)
    TAP_TIMEOUT_SCALE=${TAP_TIMEOUT_SCALE:-5}
    # Older runtimes want the usual address layout.
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        TAP_PREFIX="setarch $(uname -m) -R"
    fi
    ;;
asan | ubsan | san | cov) TAP_TIMEOUT_SCALE=${TAP_TIMEOUT_SCALE:-4} ;;
esac
# NVRTC itself is not what these look for errors in, and takes minutes.
if [ -n "$variant" ] || [ "$TAP_EFFORT" = quick ]; then
    [ -e "$dir/driver/libnvrtc.so.13" ] && EP_NVRTC_PATH=$PWD/$dir/driver/libnvrtc.so.13
    export EP_NVRTC_PATH
fi
TSAN_OPTIONS="halt_on_error=0:second_deadlock_stack=1:${TSAN_OPTIONS:-}"
ASAN_OPTIONS="abort_on_error=0:detect_stack_use_after_return=1:${ASAN_OPTIONS:-}"
UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export TAP_BOUND TAP_BUILD TAP_LOGS TAP_TIMEOUT_SCALE TAP_PREFIX TSAN_OPTIONS ASAN_OPTIONS UBSAN_OPTIONS

tests=
TAP_BOUND=
if [ $# -gt 0 ]; then
    for t in "$@"; do
        if [ -e "tests/$t.c" ]; then
            tests="$tests $dir/tests/$t"
        elif [ -e "tests/$t.sh" ]; then
            tests="$tests tests/$t.sh"
        else
            tests="$tests tests/$t"
        fi
    done
else
    [ -n "$variant" ] || [ "${TAP_EFFORT:-1}" != 1 ] || TAP_BOUND=${TAP_LIMIT:-40}
    # Scripts first: they take longest.
    case $variant in
    "")
        for t in tests/t_*.sh python/tests/t_*.py; do
            # The program and what is installed have their own tests of half a minute.
            case $TAP_EFFORT,$t in quick,*/t_tool*.sh | quick,*/t_install.sh) continue ;; esac
            [ -e "$t" ] && tests="$tests $t"
        done
        ;;
    san | tsan) tests="tests/t_driver.sh" ;;
    esac
    for src in tests/t_*.c; do
        [ -e "$src" ] && tests="$tests $dir/tests/$(basename "$src" .c)"
    done
fi
if [ -z "$tests" ]; then
    echo "${variant:-plain}: 0 passed, 0 failed, 0 skipped"
    exit 0
fi
rc=0
# A program that was not built is a failure of its own.
built=
for t in $tests; do
    if [ -e "$t" ]; then
        built="$built $t"
    else
        echo "$t was not built" | tee "$TAP_LOGS/$(basename "$t").why"
        echo 0 1 0 >"$TAP_LOGS/$(basename "$t").sum"
    fi
done
tests=$built

in_class() { # in_class CLASS JOBS: runs those of that class; what prove says is in prove-CLASS.txt
    some=
    for class in "$1, long" "$1"; do
        for t in $tests; do
            [ "$(class_of "$t")" = "$class" ] && some="$some $t"
        done
    done
    [ -n "$some" ] || return 0
    if command -v prove >/dev/null; then
        # shellcheck disable=SC2086
        prove -j "$2" --exec "scripts/run_tests.sh --one" $some \
            >"$TAP_LOGS/prove-$1.txt" 2>&1 </dev/null
    else
        # shellcheck disable=SC2086
        printf '%s\n' $some | xargs -n 1 -P "$2" scripts/run_tests.sh --one \
            >"$TAP_LOGS/prove-$1.txt" 2>&1
    fi
}
cores=$(nproc 2>/dev/null || echo 2)
# Those that mostly sleep leave the cores to the rest.
in_class timed "${TAP_TIMED_JOBS:-6}" &
timed=$!
# One more than there are cores: ranks that wait for each other leave a part of theirs.
in_class rest $((cores + 1)) || rc=1
wait $timed || rc=1
in_class exclusive 1 || rc=1
for t in $tests; do
    [ -e "$TAP_LOGS/$(basename "$t").sum" ] || echo 0 1 0 >"$TAP_LOGS/$(basename "$t").sum"
done
for sum in "$TAP_LOGS"/*.sum; do
    read -r _ failed _ <"$sum"
    [ "$failed" = 0 ] && continue
    name=$(basename "$sum" .sum)
    [ -e "$TAP_LOGS/$name.tap" ] || continue
    echo "---- $name: failed; all of it in $TAP_LOGS/$name.tap and .err"
    [ -e "$TAP_LOGS/$name.why" ] && cat "$TAP_LOGS/$name.why"
    grep -n -A4 '^not ok' "$TAP_LOGS/$name.tap" | head -20
    tail -8 "$TAP_LOGS/$name.tap"
    tail -12 "$TAP_LOGS/$name.err"
done
# Prove also checks plans and numbering; if only it complains, its words are shown.
if [ $rc != 0 ] && ! grep -qv '^[0-9]* 0 ' "$TAP_LOGS"/*.sum -h; then
    tail -n 20 "$TAP_LOGS"/prove-*.txt
    echo 0 1 0 >"$TAP_LOGS/prove.sum"
fi
cat "$TAP_LOGS"/*.tap 2>/dev/null | grep '# SKIP' | sed 's/.*# SKIP/skip:/' | sort | uniq -c
sort -rn "$TAP_LOGS/times" | awk '$1 >= 5 { print "slow: " $2 ", " $1 " s (" $3 " s of CPU)" }' |
    head -5
cat "$TAP_LOGS"/*.sum | awk -v name="${variant:-plain}" '
    { p += $1; f += $2; s += $3 }
    END { printf "%s: %d passed, %d failed, %d skipped\n", name, p, f, s; exit f > 0 }'
