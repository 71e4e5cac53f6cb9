#!/bin/sh
# SPDX-License-Identifier: MIT
# two_nodes.sh [-n RANKS] [--] [PROGRAM [ARGS]]: plays two hosts on this machine. Makes two network
# namespaces with a cable between them, runs the program across both by `ep run --hosts`, and takes them
# away again. Needs root. By default the program is the demo's Mixture-of-Experts layer.
#
# Ranks of one namespace share memory, as ranks of a host do; between the two they write over libfabric.
# EP names the ep to use, EP_NET_PROVIDER and EP_NET_IFNAME the network (docs/network.md).
if [ "$1" = --enter ]; then # what `ep run` calls in place of ssh: --enter HOST COMMAND
    exec ip netns exec "$TWO_NODES.${2##*.}" sh -c "$3"
fi
ranks=4
while [ $# -gt 0 ]; do
    case $1 in
    -n) ranks=$2 && shift 2 ;;
    --) shift && break ;;
    *) break ;;
    esac
done
top=$(cd "$(dirname "$0")/.." && pwd) || exit 1
ep=${EP:-$top/build/ep}
[ $# -gt 0 ] || set -- "$top/build/examples/moe_layer"
[ "$(id -u)" = 0 ] || { echo "two_nodes.sh: network namespaces need root" >&2; exit 77; }

TWO_NODES=ep$$
export TWO_NODES
take_away() {
    ip netns del $TWO_NODES.1 2>/dev/null
    ip netns del $TWO_NODES.2 2>/dev/null
}
trap take_away EXIT
trap 'exit 130' INT TERM HUP
{
    ip netns add $TWO_NODES.1 && ip netns add $TWO_NODES.2 &&
        ip -n $TWO_NODES.1 link add up0 type veth peer name up0 netns $TWO_NODES.2 &&
        for i in 1 2; do
            ip -n $TWO_NODES.$i link set lo up && ip -n $TWO_NODES.$i link set up0 up &&
                ip -n $TWO_NODES.$i addr add 10.78.0.$i/24 dev up0 || exit 77
        done
} || { echo "two_nodes.sh: this system makes no network namespaces (ip netns)" >&2; exit 77; }
"$ep" run --hosts 10.78.0.1,10.78.0.2 --ssh "sh $0 --enter" -n "$ranks" -- "$@"
