#!/bin/sh
# SPDX-License-Identifier: MIT
# find.sh nvrtc|nvcc|clang-format|cffi|torch|megatron: prints where it is, or nothing and fails.
cd "$(dirname "$0")/.." || exit 1

first() { # first FILE...: the first that exists
    for f in "$@"; do
        [ -e "$f" ] && echo "$f" && exit 0
    done
}
case $1 in
nvrtc)
    if [ -n "$EP_NVRTC_PATH" ]; then
        [ -d "$EP_NVRTC_PATH" ] && first "$EP_NVRTC_PATH"/libnvrtc.so.1[23]
        first "$EP_NVRTC_PATH"
        exit 1
    fi
    first build/venv/lib/python3*/site-packages/nvidia/*/lib/libnvrtc.so.1[3-9]
    for home in $CUDA_HOME $CUDA_PATH /usr/local/cuda /usr/local/cuda-1[3-9]*; do
        first "$home"/lib64/libnvrtc.so.1[3-9]
    done
    for f in $(ldconfig -p 2>/dev/null | sed -n 's/.*libnvrtc\.so\.1[3-9] .*=> //p'); do
        first "$f"
    done
    exit 1
    ;;
nvcc)
    command -v nvcc && exit 0
    for home in $CUDA_HOME $CUDA_PATH /usr/local/cuda /usr/local/cuda-1[3-9]*; do
        first "$home"/bin/nvcc
    done
    first build/venv/lib/python3*/site-packages/nvidia/*/bin/nvcc
    exit 1
    ;;
clang-format) # other versions format differently
    command -v clang-format-14 && exit 0
    clang-format --version 2>/dev/null | grep -q 'version 14\.' && command -v clang-format
    ;;
cffi)
    for python in python3 /usr/bin/python3 build/venv/bin/python; do
        "$python" -c 'import cffi' 2>/dev/null && command -v "$python" && exit 0
    done
    exit 1
    ;;
torch) # with what else the tests of the Python package need
    for package in numpy pytest wheel; do
        [ -n "$(ls -d build/venv/lib/python3*/site-packages/$package 2>/dev/null)" ] || exit 1
    done
    first build/venv/lib/python3*/site-packages/torch
    exit 1
    ;;
megatron) # a dispatcher of its own runs on deep_ep
    first build/venv/lib/python3*/site-packages/megatron/core
    exit 1
    ;;
esac
