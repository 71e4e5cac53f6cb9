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
# What is in a file is believed as a whole or not at all; a complaint names the place. TEXT|WORDS
while IFS='|' read -r text words; do
    # shellcheck disable=SC2059
    printf "$text" >"$tmp/ids"
    # shellcheck disable=SC2086
    want 1 "$ep" bench $small --routing "file:$tmp/ids" && says "file:$tmp/ids: .*$words" &&
        [ "$(wc -l <"$tmp/err")" = 1 ]
    ok "an id file is refused: $words"
done <<'END'
1 2 99 4|line 1, column 5: "99" is no expert id: .*-1..15
0 1 2 3\n4 5 6 garbage\n|line 2, column 7: "garbage"
0 1 2 15.5\n|column 7: "15.5"
0 1 2 4294967297|"4294967297"
0 1 2 18446744073709551617|"18446744073709551617"
0 1 2 99999999999999999999999999999999999999999999999999999999|99999...
0 1 2 -2|"-2"
0 1 2 +3|"+3"
0 1 2 0x3|"0x3"
0 1 2 -|"-"
0 1 2 3\0004 5|"3?4"
0 1 2 3 4|5 expert ids are no multiple of --topk 4
 ,;\n|0 expert ids
|it is empty
END
want 1 "$ep" bench $small --routing "file:$tmp/no-such-file" && says 'there is no such file'
ok "an id file that is not there is named"
mkfifo "$tmp/fifo"
for odd in "$tmp" "$tmp/fifo" /dev/zero; do
    want 1 timeout 60 "$ep" bench $small --routing "file:$odd" && says "file:$odd: it is" &&
        want 1 timeout 60 "$ep" demo --device host --file "$odd" && says "$odd: it is"
    ok "what is no file is refused, and not waited for: ${odd##*.}"
done
want 0 sh -c "{ sleep 0.3; echo 1 2 3 4; } | '$ep' bench $small --routing file:/dev/stdin"
ok "a pipe into which somebody writes is read"
printf -- '-1 -1 -1 -1\n' >"$tmp/ids"
want 0 "$ep" bench $small --routing "file:$tmp/ids" && ! has nan &&
    want 0 "$ep" bench $small --routing "file:$tmp/ids" --json && ! has nan && is_json "$tmp/out"
ok "a routing that sends nothing is measured"

# Arguments that do not go together: STATUS OPTIONS. 0 is measured and checked, 2 is refused in a
# sentence before any rank is started, 1 needs too much memory.
tiny="--tokens 4 --hidden 16 --iters 1 --warmup 0"
while read -r status options; do
    # shellcheck disable=SC2086
    want "$status" timeout 120 "$ep" bench $tiny $options &&
        { [ "$status" = 0 ] || { [ "$(wc -l <"$tmp/err")" = 1 ] && [ ! -s "$tmp/out" ]; }; }
    ok "bench $options gives $status"
done <<'END'
0 --ranks 3 --experts 1 --topk 1
0 --ranks 4 --experts 3 --topk 3
0 --ranks 3 --experts 1 --topk 1 --expanded
0 --ranks 5 --experts 2 --topk 2 --threads --uncached
0 --ranks 4 --experts 3 --topk 1 --routing skewed
0 --ranks 4 --experts 2 --topk 1 --routing grouped --groups 2 --topk-groups 1
0 --ranks 9 --experts 9 --topk 9 --tokens 1
0 --ranks 1 --experts 1 --topk 1 --routing half
0 --ranks 2 --experts 64 --topk 64 --expanded
0 --ranks 2 --experts 65536 --topk 1 --tokens 1 --expanded
0 --ranks 1 --tokens 1 --experts 1 --topk 1 --arena --expanded
0 --ranks 2 --experts 4 --topk 2 --workers 3 --copy
0 --ranks 2 --experts 4 --topk 2 --dtype fp8 --hidden 16
0 --mode ll --ranks 1 --hidden 128 --experts 1 --topk 1 --dtype bf16
0 --mode ll --ranks 3 --hidden 384 --experts 7 --topk 3 --threads --dtype fp8 --routing skewed
2 --ranks 0
2 --ranks 65
2 --ranks -1
2 --ranks 2 --experts 0
2 --ranks 2 --experts 65537
2 --tokens 1048577
2 --tokens 99999999999999999999
2 --topk 0
2 --topk 65
2 --topk 2 --experts 1
2 --hidden 7
2 --hidden 17 --dtype fp8
2 --hidden 1048577
2 --iters 0
2 --iters 100001
2 --warmup -1
2 --workers 1025
2 --seed -1
2 --arena --copy
2 --mode
2 --mode latency
2 --mode ll --hidden 192
2 --mode ll --hidden 128 --arena
2 --mode ll --hidden 128 --copy
2 --mode ll --hidden 128 --expanded
2 --mode ll --hidden 128 --uncached
2 --mode ll --hidden 128 --dtype f32
2 --mode ll --sweep hidden=128,130
2 --dtype
2 --device gpu
2 --routing
2 --routing file
2 --routing half --ranks 2 --experts 4 --topk 8
2 --routing half --ranks 3 --experts 2 --topk 2
2 --routing grouped --experts 10 --groups 4
2 --routing grouped --experts 4 --groups 8 --topk 1
2 --routing grouped --experts 16 --groups 4 --topk-groups 5 --topk 1
2 --routing grouped --experts 16 --groups 4 --topk-groups 1 --topk 5
2 --max-tokens 3
2 --sweep tokens
2 --sweep tokens=
2 --sweep tokens=1,
2 --sweep tokens=1;
2 --sweep tokens=+1
2 --sweep tokens=1.5
2 --sweep tokens=4294967297
2 --sweep tokens=18446744073709551617
2 --sweep token=1
2 --sweep tokens=1;tokens=2
2 --sweep tokens=1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17
2 --sweep tokens=1,2,3,4,5,6,7,8;hidden=16,32,48,64,80,96,112,128;topk=1,2,3,4,5
2 --sweep topk=1,300
2 --sweep hidden=16,7
2 --sweep experts=8,4;topk=2,5
1 --tokens 1048576 --hidden 1048576
1 --tokens 1048576 --experts 65536 --topk 64 --ranks 64 --hidden 16
END
want 0 "$ep" bench $small --sweep 'tokens=8,16;hidden=64,128' --json && is_json "$tmp/out" &&
    [ "$(grep -c '"phase": "route"' "$tmp/out")" = 4 ]
ok "bench --json with a sweep of four cases"
want 0 "$ep" bench $small --max-tokens 300 --sweep 'tokens=8,16' && has 'grows with tokens' &&
    has '^combine from .* us + .* us per 1000 tokens'
ok "bench says how times grow with tokens, in a group that is planned for more"
want 0 "$ep" bench $small --models --sweep 'tokens=8;hidden=64' --csv &&
    [ "$(wc -l <"$tmp/out")" = 33 ] && has ',8,8,64,16,896,'
ok "bench --models has a case for each"
low="--mode ll -n 2 --hidden 256 --tokens 8 --iters 1 --warmup 0"
want 0 "$ep" bench $small $low && has 'data checked' &&
    for row in 'fp8 round trip' 'bf16 round trip' 'fp8 dispatch' 'bf16 dispatch' \
        'fp8 dispatch, send half' 'bf16 dispatch, receive half' 'bf16 combine' \
        'bf16 combine, send half' 'bf16 combine, receive half' 'bf16 round trip, cold' \
        'fp8 two in halves, beside' \
        'bf16 combine, weights given' 'bf16 combine, exact' 'bf16 combine, LogFMT'; do
        has "^$row  *[0-9.]* [umn]*s" || break
    done && [ "$row" = 'bf16 combine, LogFMT' ] && has "^$row  *[0-9.]* [umn]*s"
ok "bench --mode ll measures and checks round trip, dispatch, combine, its forms and halves"
want 0 "$ep" bench $small $low --dtype bf16 --routing "file:$tmp/ids" --json &&
    is_json "$tmp/out" && ! has nan && has '"phase": "ll_round_trip_bf16"' && has '"output": "packed"'
ok "bench --mode ll --json, of a routing that sends nothing"
want 0 "$ep" bench $small --csv && [ "$(wc -l <"$tmp/out")" = 9 ] &&
    [ "$(awk -F, '{ print NF }' "$tmp/out" | sort -u | wc -l)" = 1 ]
ok "bench --csv has one line per phase, all of one width"
want 1 "$ep" bench --tokens 40000 --hidden 1000000 && says 'lower --tokens'
ok "a case that does not fit in memory is refused before it starts"
echo "1..$n"
