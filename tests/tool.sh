# SPDX-License-Identifier: MIT
# What tests of the program `ep` have in common; sourced by t_tool*.sh from the root of the tree.
# EP_BUILD is the directory of the build (default build).
build=${EP_BUILD:-build}
ep=$build/ep
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
n=0
mark=98765.$$ # a number of seconds that names our sleeps

ok() { # ok WHAT: the status of the last command decides
    if [ $? = 0 ]; then verdict=ok; else verdict="not ok"; fi
    n=$((n + 1))
    echo "$verdict $n - $1"
    [ "$verdict" = ok ] || sed 's/^/# /' "$tmp/out" "$tmp/err" | tail -12
}
# want STATUS COMMAND...: runs it, output in $tmp/out and $tmp/err
want() {
    want_status=$1
    shift
    "$@" >"$tmp/out" 2>"$tmp/err" </dev/null
    got_status=$?
    [ $got_status = "$want_status" ] || { echo "# status $got_status: $*"; false; }
}
has() { grep -q -e "$1" "$tmp/out"; }
says() { grep -q -e "$1" "$tmp/err"; }
left() { # left MARK: a process whose command line holds MARK is alive; that of grep does not
    cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -qF -f /dev/fd/3 3<<END
$1
END
}
gone() { # gone MARK: within two seconds nothing of it is left
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        left "$1" || return 0
        sleep 0.2
    done
    return 1
}
come() { # come MARK: waits until there is such a process; 10 s
    for _ in $(seq 100); do
        left "$1" && sleep 0.1 && return 0
        sleep 0.1
    done
    return 1
}
await() { # await N TEXT: waits until N lines of $tmp/out end with TEXT; 10 s
    for _ in $(seq 100); do
        [ "$(grep -c -e "$2\$" "$tmp/out")" -ge "$1" ] && return 0
        sleep 0.1
    done
    return 1
}
child_of() { # child_of PID: the first of its children
    cat /proc/[0-9]*/stat 2>/dev/null | sed 's/(.*)/-/' | awk '$4 == '"$1"' { print $1; exit }'
}
state_of() { sed 's/.*) \(.\).*/\1/' "/proc/$1/stat" 2>/dev/null; }
is_json() { ! command -v python3 >/dev/null || python3 -m json.tool <"$1" >/dev/null; }
