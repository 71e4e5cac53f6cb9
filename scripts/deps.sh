#!/bin/sh
# SPDX-License-Identifier: MIT
# deps.sh build|check|gate: installs what that target needs and this machine lacks.
# Says which packages first, never prompts, is silent when nothing is missing. DEPS=0 skips.
# What cannot be installed is named, with the command to run by hand; what `check` can do without
# (tests that skip say what they lack) is left out then.
[ "${DEPS:-1}" = 0 ] && exit 0
target=${1:?usage: deps.sh build|check|gate}
cd "$(dirname "$0")/.." || exit 1
packages=
optional=
wheels=
torch=
megatron=
venv=build/venv
cuda='>=13.0,<13.1' # what the gate compiles with

need() { # need PACKAGE COMMAND...: the package is missing when the command fails
    package=$1
    shift
    "$@" >/dev/null 2>&1 || packages="$packages $package"
}
want() { # the same, but nothing fails without it
    package=$1
    shift
    "$@" >/dev/null 2>&1 || optional="$optional $package"
}
has() { command -v "$1"; }
has_sbin() { has "$1" || test -x "/usr/sbin/$1"; }
has_libc() { echo '#include <stdio.h>' | "${CC:-cc}" -E - || echo '#include <stdio.h>' | gcc -E -; }
has_venv() { python3 -c 'import venv, ensurepip' || [ -x $venv/bin/pip ]; }
has_cffi() { [ -n "$(scripts/find.sh cffi)" ]; }
has_clang_format() { [ -n "$(scripts/find.sh clang-format)" ]; }
has_fabric() { ldconfig -p | grep 'libfabric[.]so[.]1'; }
has_clang_rt() {
    dir=$(clang -print-runtime-dir 2>/dev/null)
    ls "$dir"/libclang_rt.fuzzer*.a "$dir"/linux/libclang_rt.fuzzer*.a 2>/dev/null | grep -q .
}
# The runtime's package carries the number of the distribution's clang.
clang_rt_package() {
    v=$(clang -dumpversion 2>/dev/null | cut -d. -f1)
    [ -n "$v" ] || v=$(apt-cache depends clang 2>/dev/null |
        sed -n 's/.*Depends: clang-\([0-9][0-9]*\)$/\1/p' | head -1)
    for p in "libclang-rt-$v-dev" "libclang-common-$v-dev"; do
        apt-cache show "$p" >/dev/null 2>&1 && echo "$p" && return
    done
    echo "libclang-rt-${v:-14}-dev"
}

build_needs() {
    [ -n "$CC" ] && has "$CC" >/dev/null || need gcc has gcc
    need libc6-dev has_libc
    need make has make
}
gate_needs() {
    build_needs
    need gcc-aarch64-linux-gnu has aarch64-linux-gnu-gcc
    need libc6-dev-arm64-cross test -e /usr/aarch64-linux-gnu/include/stdio.h
    if [ -z "$(scripts/find.sh nvrtc)" ]; then
        wheels="nvidia-cuda-nvrtc$cuda"
    fi
    if [ -z "$(scripts/find.sh nvcc)" ] && [ "$(uname -m)" = x86_64 ]; then
        wheels="$wheels nvidia-cuda-nvcc$cuda nvidia-cuda-crt$cuda nvidia-nvvm$cuda"
        wheels="$wheels nvidia-cuda-runtime$cuda"
    fi
    if [ -n "$wheels" ]; then
        need python3 has python3
        need python3-venv has_venv
    fi
}
check_needs() {
    gate_needs
    need python3-venv has_venv
    [ -n "$(scripts/find.sh torch)" ] || torch="torch==2.13.0 numpy pytest setuptools>=77 wheel"
    [ -n "$(scripts/find.sh megatron)" ] || megatron=megatron-core==0.16.1
    need g++ has g++
    need clang has clang
    need clang-format-14 has_clang_format
    need "$(clang_rt_package)" has_clang_rt
    need perl has prove
    need spin has spin
    need pkg-config has pkg-config
    need binutils has nm
    need python3 has python3
    need python3-cffi has_cffi
    want mpich has mpiexec.hydra
    want openmpi-bin has orterun
    want munge has_sbin munged
    want slurm-client has srun
    want slurmctld has_sbin slurmctld
    want slurmd has_sbin slurmd
    want libfabric1 has_fabric
    want iproute2 has_sbin ip
    want openssh-server has_sbin sshd
    want openssh-client has ssh
    want libfabric-dev test -e /usr/include/rdma/fabric.h
}
case $target in
build) build_needs ;;
gate) gate_needs ;;
check) check_needs ;;
*) echo "deps.sh: no such target: $target" >&2; exit 2 ;;
esac

# A machine without a package's candidate must not lose the others, so failures come last.
if [ -n "$packages" ]; then
    # shellcheck disable=SC2086
    packages=$(printf '%s\n' $packages | awk '!seen[$0]++' | tr '\n' ' ')
    echo "make $target needs packages: $packages"
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    by_hand="apt-get install --no-install-recommends $packages"
    if ! command -v apt-get >/dev/null; then
        echo "no apt-get here; install the like of: $packages (or run make with DEPS=0)" >&2
        exit 1
    fi
    if [ -n "$sudo" ] && ! $sudo true 2>/dev/null; then
        echo "not root, and sudo asks for a password; run: sudo $by_hand" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    mkdir -p build/logs
    install() {
        # shellcheck disable=SC2086
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            $packages </dev/null >build/logs/apt.log 2>&1
    }
    if ! install; then
        $sudo apt-get update </dev/null >/dev/null 2>&1
        if ! install; then
            tail -5 build/logs/apt.log >&2
            echo "apt-get failed (build/logs/apt.log); run: ${sudo:+sudo }$by_hand" >&2
            exit 1
        fi
    fi
fi
if [ -n "$optional" ] && command -v apt-get >/dev/null; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo="sudo -n"
    mkdir -p build/logs
    echo "make $target tests more with packages:$optional"
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y \
        --no-install-recommends $optional </dev/null >build/logs/apt-optional.log 2>&1 ||
        echo "which cannot be installed (build/logs/apt-optional.log): their tests are skipped"
fi
# into_venv WHEEL...: pip's status; its output is in build/logs/pip.log.
into_venv() {
    echo "make $target needs, into $venv: $*"
    mkdir -p build/logs
    { { [ -x $venv/bin/pip ] || python3 -m venv $venv; } &&
        $venv/bin/pip install --quiet --disable-pip-version-check "$@"; } \
        </dev/null >build/logs/pip.log 2>&1
}
# shellcheck disable=SC2086
if [ -n "$wheels" ] && ! into_venv $wheels; then
    tail -5 build/logs/pip.log >&2
    echo "pip failed; run: python3 -m venv $venv && $venv/bin/pip install$(
        printf " '%s'" $wheels)" >&2
    echo "or set EP_NVRTC_PATH to a libnvrtc.so and put nvcc on PATH" >&2
    exit 1
fi
for more in "$torch" "$megatron"; do
    # shellcheck disable=SC2086
    if [ -n "$more" ] && ! into_venv $more; then
        tail -5 build/logs/pip.log >&2
        echo "pip failed on $more: the tests that need it are skipped" >&2
    fi
done
exit 0
