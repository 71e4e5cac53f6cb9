#!/bin/sh
# SPDX-License-Identifier: MIT
# must_fail.sh: tests that must fail do. Each line of tests/must_fail.txt weakens the library
# with compiler flags, builds one test under ThreadSanitizer and expects it to report:
#
#   NAME | FLAGS | TEST | TEXT        e.g.  weak-publish | -DK_WEAK_PUBLISH=1 | t_dispatch | race
#
# The flags mean something to the kernel language alone: what does not include it is taken from
# build/tsan, which must be built (make tsan, make check).
# Last line: "must-fail: N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
list=tests/must_fail.txt
passed=0
failed=0
prefix=
setarch "$(uname -m)" -R true 2>/dev/null && prefix="setarch $(uname -m) -R"
mkdir -p build/logs
[ -e $list ] || { echo "must-fail: 0 passed, 0 failed, 0 skipped"; exit 0; }
jobs=-j$(nproc 2>/dev/null || echo 2)
cc=$(sed 's/ -std=.*//' build/tsan/flags) || { echo "must-fail: 0 passed, 1 failed, 0 skipped"; exit 1; }
weakened=$(grep -rlE --include='*.d' 'kernel/lang_host\.h|tests/late/' build/tsan/obj/kernel \
    build/tsan/obj/src build/tsan/obj/tests/late | sed 's,^build/tsan/,,; s,\.d$,.o,')
grep -v '^ *\(#\|$\)' $list >build/logs/must_fail.list
while IFS='|' read -r name flags test text; do
    name=$(echo $name) test=$(echo $test) text=$(echo "$text" | sed 's/^ *//; s/ *$//')
    dir=build/mustfail/$(echo "$flags" | tr -dc A-Za-z0-9_=) # the same for the same flags
    log=build/logs/must_fail-$name.txt
    objects=
    for o in $weakened; do
        source=${o#obj/}
        [ -e "${source%.o}.c" ] && objects="$objects $dir/$o"
    done
    # An object that is given comes before its like in the library.
    # shellcheck disable=SC2086
    if ! env -u MAKEFLAGS -u MFLAGS make --no-print-directory $jobs VARIANT=tsan BUILD="$dir" \
        CC="$cc" KERNEL_OPT=-O1 EXTRA_CFLAGS="$(echo $flags)" $objects >"$log" 2>&1 </dev/null ||
        ! { mkdir -p "$dir/tests" && $(cat build/tsan/flags) -o "$dir/tests/$test" $objects \
            "build/tsan/obj/tests/$test.o" build/tsan/libtest.a build/tsan/libep.a \
            -ldl -lm; } >>"$log" 2>&1; then
        echo "must-fail $name: does not build"
        tail -5 "$log"
        failed=$((failed + 1))
        continue
    fi
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 TAP_TIMEOUT_SCALE=5 TAP_BUILD=$dir \
        timeout -k 5 60 $prefix "$dir/tests/$test" \
        >>"$log" 2>&1 </dev/null
    rc=$?
    if [ $rc != 0 ] && grep -q -e "$text" "$log"; then
        echo "must-fail $name: caught ($test: $(grep -e "$text" "$log" | head -1))"
        passed=$((passed + 1))
    else
        echo "must-fail $name: NOT caught by $test (status $rc), see $log"
        failed=$((failed + 1))
    fi
done <build/logs/must_fail.list
echo "must-fail: $passed passed, $failed failed, 0 skipped"
[ $failed = 0 ]
