#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest
# `ep bench` on host ranks: what it prints and refuses. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh

# ---- ep bench
small="--tokens 64 --hidden 64 --experts 16 --topk 4 --iters 3 --warmup 1"
for more in "" "--expanded" "--threads" "--dtype fp8 --hidden 256" "--dtype f32" \
    "-n 3 --uncached" "--routing grouped --groups 4 --topk-groups 2" \
    "--routing skewed --copy" "-n 1 --arena" "--routing half" "-n 3 --routing half --expanded" \
    "--expanded --dtype fp8 --hidden 256 --routing skewed --threads"; do
    # shellcheck disable=SC2086
    want 0 "$ep" bench $small $more && has '^route' && has '^combine from' && has GB/s
    ok "bench ${more:-as it is} checks its data and passes"
done
want 0 "$ep" bench $small -n 3 --routing half --tokens 60 && has 'busiest rank 1.50 x'
ok "half routing gives rank 0 half of all rows"
printf '1 2 3 4\n5,6,7,8\n-1 9 10 11\n' >"$tmp/ids"
want 0 "$ep" bench $small --routing "file:$tmp/ids" && has 'file routing'
ok "bench replays ids from a file"
printf '1 2 99 4\n' >"$tmp/ids"
want 1 "$ep" bench $small --routing "file:$tmp/ids" && says 99
ok "a bad id in the file is named"
want 0 "$ep" bench $small --sweep 'tokens=8,16;hidden=64,128' --json && is_json "$tmp/out" &&
    [ "$(grep -c '"phase": "route"' "$tmp/out")" = 4 ]
ok "bench --json with a sweep of four cases"
want 0 "$ep" bench $small --csv && [ "$(wc -l <"$tmp/out")" = 9 ] &&
    [ "$(awk -F, '{ print NF }' "$tmp/out" | sort -u | wc -l)" = 1 ]
ok "bench --csv has one line per phase, all of one width"
want 1 "$ep" bench --tokens 40000 --hidden 1000000 && says 'lower --tokens'
ok "a case that does not fit in memory is refused before it starts"
echo "1..$n"
