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
bad=0
for file in "$@"; do
    "$tool" --dry-run -Werror "$file" >/dev/null 2>&1 || {
        echo "$file: not formatted; run make fmt"
        "$tool" "$file" | diff -u "$file" - | sed -n '3,12p'
        bad=1
    }
done
exit $bad
