#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed
# Ranks that MPICH's and Open MPI's launchers start: they meet without a setting, two jobs at once
# never mix, and a pod's RANK around a launcher is told. Skips what is not installed. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh
for name in RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT EP_JOB EP_PORT; do
    unset $name
done
rank="$PWD/$build/tests/t_launch rank"
limit=$((60 * ${TAP_TIMEOUT_SCALE:-1}))

# all_of JOB N FILE: N ranks of that job met, and they met nobody else
all_of() {
    letters=$(printf "%$2s" '' | tr ' ' "$1")
    [ "$(grep -c "^job $1 rank [0-9]* of $2: $letters\$" "$3")" = "$2" ] ||
        { sed 's/^/# /' "$3"; false; }
}
# a launcher is the words that start two ranks of what follows them
try() { # try NAME LAUNCHER...
    name=$1
    shift
    mkdir -p "$tmp/A" "$tmp/B" # two of Open MPI's that begin at once fail over one folder
    # shellcheck disable=SC2086
    JOB=A TMPDIR=$tmp/A timeout $limit "$@" $rank >"$tmp/a" 2>&1 &
    # shellcheck disable=SC2086
    JOB=B TMPDIR=$tmp/B timeout $limit "$@" $rank >"$tmp/b" 2>&1
    wait $!
    all_of A 2 "$tmp/a" && all_of B 2 "$tmp/b"
    ok "$name: two jobs at once do not mix"
    JOB=C timeout $limit "$@" sh -c "env $rank; true" >"$tmp/c" 2>&1
    all_of C 2 "$tmp/c"
    ok "$name: a shell in between is no matter"
    # shellcheck disable=SC2086
    RANK=0 WORLD_SIZE=1 JOB=D timeout $limit "$@" $rank >"$tmp/d" 2>&1
    [ $? != 0 ] && [ "$(grep -c 'RANK=0 and WORLD_SIZE=1 say' "$tmp/d")" = 2 ] ||
        { sed 's/^/# /' "$tmp/d"; false; }
    ok "$name: the RANK of a pod is not believed in silence"
}
skip() {
    n=$((n + 3))
    for i in 2 1 0; do
        echo "ok $((n - i)) # SKIP $1 is not installed"
    done
}
if command -v mpiexec.hydra >/dev/null; then
    try MPICH mpiexec.hydra -n 2
else
    skip "MPICH (mpiexec.hydra)"
fi
if command -v orterun >/dev/null; then
    # Open MPI runs as root, and more ranks than there are cores, when asked twice.
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    try "Open MPI" orterun --oversubscribe -n 2
else
    skip "Open MPI (orterun)"
fi
echo "1..$n"
