#!/bin/sh
# SPDX-License-Identifier: MIT
# fmt.sh check|fix FILE...: the format of .clang-format (version 14). Exit 77: no clang-format.
mode=$1
shift
tool=$("$(dirname "$0")"/find.sh clang-format) || {
    echo "skip: no clang-format of version 14"
    exit 77
}
[ $# -gt 0 ] || exit 0
if [ "$mode" = fix ]; then
    exec "$tool" -i "$@"
fi
# On all cores; what it says of a file begins with the file's name.
said=$(printf '%s\0' "$@" | xargs -0 -P "$(nproc 2>/dev/null || echo 2)" -n 30 "$tool" --dry-run -Werror 2>&1) &&
    exit 0
bad=$(echo "$said" | sed -n 's/^\([^: ]*\):[0-9]*:[0-9]*: error: .*-Wclang-format-violations.*/\1/p' | sort -u)
[ -n "$bad" ] || echo "$said" | tail
for file in $bad; do
    echo "$file: not formatted; run make fmt"
    "$tool" "$file" | diff -u "$file" - | sed -n '3,12p'
done
exit 1
