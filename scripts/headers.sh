#!/bin/sh
# SPDX-License-Identifier: MIT
# headers.sh: include/ep.h compiles alone as C99, C11 and C++17, and cffi parses it.
cd "$(dirname "$0")/.." || exit 1
[ -e include/ep.h ] || { echo "no include/ep.h"; exit 1; }
num=0
bad=0
strict="-Wall -Wextra -Werror -pedantic-errors -fsyntax-only -Iinclude"

try() { # try WHAT COMMAND...
    what=$1
    shift
    num=$((num + 1))
    if printf '#include "ep.h"\n#include "ep.h"\nint main(void) { return 0; }\n' | "$@" - ; then
        echo "ok: ep.h as $what"
    else
        echo "FAILED: ep.h as $what"
        bad=1
    fi
}
for cc in gcc clang; do
    command -v $cc >/dev/null || continue
    for std in c99 c11; do
        # shellcheck disable=SC2086
        try "$std by $cc" $cc -std=$std $strict -x c
    done
done
for cxx in g++ clang++; do
    command -v $cxx >/dev/null || continue
    # shellcheck disable=SC2086
    try "c++17 by $cxx" $cxx -std=c++17 $strict -x c++
done
[ $num -gt 0 ] || { echo "no compiler"; exit 1; }

python=$(scripts/find.sh cffi)
if [ -n "$python" ]; then
    # The preprocessor only expands and drops directives; nothing is filtered out by hand.
    if grep -v '^#include <' include/ep.h | ${CC:-cc} -E -P -x c - |
        "$python" -c '
import sys, cffi
ffi = cffi.FFI()
ffi.cdef(sys.stdin.read())
'; then
        echo "ok: ep.h by cffi"
    else
        echo "FAILED: ep.h by cffi"
        bad=1
    fi
else
    echo "skip: no cffi"
fi
exit $bad
