#!/bin/sh
# SPDX-License-Identifier: MIT
# exports.sh [LIBEP.SO]: what the library exports is exactly what ep.h declares.
cd "$(dirname "$0")/.." || exit 1
lib=${1:-build/libep.so}
mkdir -p build
[ -e "$lib" ] || { echo "no $lib"; exit 1; }
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# Declarations outside braces that are no typedef: the name before the first parenthesis.
grep -v '^#include' include/ep.h | ${CC:-cc} -E -P -x c - | tr '\n' ' ' |
    awk '{ depth = 0
           for (i = 1; i <= length($0); i++) {
               c = substr($0, i, 1)
               if (c == "{") depth++
               else if (c == "}") depth--
               else if (depth == 0) printf "%s", (c == ";" ? "\n" : c)
           } }' |
    sed -n '/typedef/d; s/^[^(]*\<\(ep_[a-z0-9_]*\) *(.*/\1/p' | LC_ALL=C sort -u >"$tmp/declared"
nm -D --defined-only "$lib" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' |
    LC_ALL=C sort -u >"$tmp/exported"
missing=$(LC_ALL=C comm -23 "$tmp/declared" "$tmp/exported")
extra=$(LC_ALL=C comm -13 "$tmp/declared" "$tmp/exported")
[ -s "$tmp/declared" ] || { echo "no declaration found in ep.h"; exit 1; }
[ -z "$missing" ] || printf 'declared in ep.h, not exported: %s\n' $missing
[ -z "$extra" ] || printf 'exported, not declared in ep.h: %s\n' $extra
[ -z "$missing$extra" ] || exit 1
echo "ok: $(wc -l <"$tmp/exported") symbols exported, all declared in ep.h"
