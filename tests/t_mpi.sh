#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed
# Ranks that MPICH's, Open MPI's and Slurm's launchers start: they meet without a setting, two jobs at
# once never mix, and a pod's RANK around a launcher is told. Skips what is not installed. TAP.
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
    # a launcher may end the second for the first
    [ $? != 0 ] && grep -q 'RANK=0 and WORLD_SIZE=1 say' "$tmp/d" ||
        { sed 's/^/# /' "$tmp/d"; false; }
    ok "$name: the RANK of a pod is not believed in silence"
}
skip() { # skip POINTS WHY
    for _ in $(seq "$1"); do
        n=$((n + 1))
        echo "ok $n # SKIP $2"
    done
}
if command -v mpiexec.hydra >/dev/null; then
    try MPICH mpiexec.hydra -n 2
else
    skip 3 "MPICH (mpiexec.hydra) is not installed"
fi
if command -v orterun >/dev/null; then
    # Open MPI runs as root, and more ranks than there are cores, when asked twice.
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    try "Open MPI" orterun --oversubscribe -n 2
else
    skip 3 "Open MPI (orterun) is not installed"
fi

# A cluster of this host, for as long as the test: who may speak in it is told by a munge of its own.
slurm_daemons() {
    export SLURM_CONF="$slurm/slurm.conf"
    port=$((20000 + 2 * ($$ % 5000)))
    mkdir -p "$slurm/state" "$slurm/spool" "$slurm/munge"
    chmod 755 "$tmp" "$slurm" "$slurm/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$slurm/key")
    cat >"$SLURM_CONF" <<END
ClusterName=t
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$slurm/munge/socket
StateSaveLocation=$slurm/state
SlurmdSpoolDir=$slurm/spool
SlurmctldPidFile=$slurm/slurmctld.pid
SlurmdPidFile=$slurm/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
ReturnToService=2
NodeName=localhost CPUs=4
PartitionName=t Nodes=localhost Default=YES OverSubscribe=FORCE
END
    munged -F --force --key-file="$slurm/key" --socket="$slurm/munge/socket" \
        --pid-file="$slurm/munge/pid" --log-file="$slurm/munge/log" \
        --seed-file="$slurm/munge/seed" >"$slurm/munged.out" 2>&1 &
    daemons=$!
    slurmctld -D >"$slurm/slurmctld.out" 2>&1 &
    daemons="$daemons $!"
    slurmd -D -N localhost >"$slurm/slurmd.out" 2>&1 &
    daemons="$! $daemons"
}
slurm_works() {
    for _ in $(seq 150); do
        timeout 5 srun -n 2 true 2>/dev/null && return
        sleep 0.2
    done
    false
}
slurm=$tmp/slurm
PATH=$PATH:/usr/sbin
missing=
for name in munged slurmctld slurmd srun; do
    command -v $name >/dev/null || missing="$missing $name"
done
if [ -n "$missing" ]; then
    skip 4 "Slurm is not installed:$missing"
else
    daemons=
    # shellcheck disable=SC2086
    trap '{ kill $daemons; sleep 1; kill -9 $daemons; wait $daemons; } 2>/dev/null; rm -rf "$tmp"' EXIT
    slurm_daemons
    if slurm_works; then
        try Slurm srun -n 2
        # Of one allocation: both have its number.
        echo "JOB=A srun --overlap -n 2 $rank >$tmp/a 2>&1 &
            JOB=B srun --overlap -n 2 $rank >$tmp/b 2>&1; wait" >"$tmp/steps"
        timeout $limit salloc -n 2 sh "$tmp/steps" >"$tmp/salloc" 2>&1
        all_of A 2 "$tmp/a" && all_of B 2 "$tmp/b"
        ok "Slurm: two steps at once do not mix"
    else
        tail -n 2 "$slurm"/*.out | sed 's/^/# /'
        skip 4 "Slurm does not start here"
    fi
fi
echo "1..$n"
