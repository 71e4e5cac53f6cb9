#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest, long
# Throughput mode between nodes: programs of one host's ranks, unchanged, whose ranks EP_TEST_NODES
# divides into two nodes or three uneven ones, on the fake network and over libfabric where it is. One
# point for each; its output is in TAP_LOGS. Under sanitizers some of them, on the fake network.
build=${TAP_BUILD:-build}
logs=${TAP_LOGS:-$build/logs}/across
mkdir -p "$logs"
run() { # nodes provider program
    [ "$2" = fake ] || export EP_NET_IFNAME=lo
    EP_TEST_NODES=$1 EP_NET_PROVIDER=$2 EP_CASES=12 TAP_EFFORT=quick \
        timeout -k 5 $((100 * ${TAP_TIMEOUT_SCALE:-1})) $TAP_PREFIX "$build/tests/$3" \
        >"$logs/$1.$3.tap" 2>"$logs/$1.$3.err"
}
if [ "$1" = --one ]; then
    run "$2" "$3" "$4"
    echo $? >"$logs/$2.$4.rc"
    exit 0
fi
runs="2 fake:1 t_cached
2 fake:2 t_capacity
2 fake:3 t_mismatch
2 fake:4 t_begin_finish
3 fake:7 t_combine
3 fake:8 t_cached
3 fake:9 t_dispatch_expanded
3 fake:10 t_determinism
3 fake:11 t_random
3 fake:12 t_layout"
tcp='2 tcp;ofi_rxm t_stats
3 tcp;ofi_rxm t_workers'
case $build in
*/san | */tsan) runs="2 fake:1 t_cached
3 fake:2 t_begin_finish
3 fake:3 t_random"
    tcp= ;;
esac
if [ -n "$tcp" ] && "$build/ep" doctor 2>/dev/null | grep -q 'ofi_rxm.*lo'; then
    runs="$runs
$tcp"
fi
n=0
bad=0
echo "$runs" | tr ' ' '\n' | xargs -n 3 -P "$(nproc 2>/dev/null || echo 2)" sh "$0" --one
while read -r nodes provider program; do
    n=$((n + 1))
    if [ "$(cat "$logs/$nodes.$program.rc")" = 0 ]; then
        echo "ok $n - $nodes nodes, $provider: $program, $(grep -c '^ok' "$logs/$nodes.$program.tap") points"
    else
        bad=1
        echo "not ok $n - $nodes nodes, $provider: $program"
        grep -h -B5 '^not ok\|^Bail\|WARNING: Thr\|ERROR: Addr\|runtime error' \
            "$logs/$nodes.$program.tap" "$logs/$nodes.$program.err" | head -24 | sed 's/^/# /'
    fi
done <<EOF
$runs
EOF
echo "1..$n"
exit $bad
