#!/bin/bash
# SPDX-License-Identifier: MIT
# python.sh [PYTEST ARGUMENT...]: builds the wheels, as pip does, and runs tests/python on them: with
# the Python of build/venv, which has torch, and without arguments also with the oldest and the newest
# Python that the machine has, with numpy alone. The wheels go to build/python, not into an environment.
# PYTHON names another Python that has torch, numpy, pytest, setuptools and wheel.
# The last line: "python: N passed, N failed, N skipped".
cd "$(dirname "$0")/.." || exit 1
venv=${PYTHON:-build/venv/bin/python}
out=$PWD/build/python

if ! "$venv" -c 'import torch, numpy, pytest, setuptools, wheel' 2>/dev/null; then
    echo "python: $venv lacks torch, numpy, pytest or wheel; make check without DEPS=0 gets them"
    echo "python: 0 passed, 0 failed, 1 skipped"
    exit 77
fi

# run LABEL PYTHON ARGUMENT...: one pytest; its counts go to a file, because several run at once.
run() {
    local label=$1 python=$2 log=$out/$1.txt what
    shift 2
    PYTHONPATH=$out/site timeout -k 5 900 "$python" -m pytest -q -p no:cacheprovider --rootdir tests/python \
        "$@" >"$log" 2>&1 </dev/null
    local rc=$?
    what=$(grep -E '^[0-9]+ (passed|failed|skipped|error)|no tests ran' "$log" | tail -1)
    [ "$rc" = 0 ] && [ -n "$what" ] || tail -60 "$log"
    echo "$label: ${what:-ended with status $rc}"
    count() { grep -oE "[0-9]+ $1" <<<"$what" | grep -oE '[0-9]+' || echo 0; }
    local failed=$(($(count failed) + $(count error)))
    [ "$rc" = 0 ] || [ $failed != 0 ] || failed=1
    echo "$(count passed) $failed $(count skipped)" >>"$out/sums"
}

mkdir -p "$out/wheels"
rm -rf "$out/site" "$out"/wheels/*.whl build/lib build/bdist.* build/temp.*
for project in . python/*/pyproject.toml; do
    [ -e "$project" ] || continue
    project=./${project%pyproject.toml}
    if ! "$venv" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        -w "$out/wheels" "$project" </dev/null >"$out/build.txt" 2>&1; then
        tail -30 "$out/build.txt"
        echo "python: the wheel of $project was not built"
        echo "python: 0 passed, 1 failed, 0 skipped"
        exit 1
    fi
done
"$venv" -m pip install --quiet --disable-pip-version-check --no-deps --target "$out/site" \
    "$out"/wheels/*.whl </dev/null || exit 1
ls "$out"/wheels | sed 's/^/built /'

rm -f "$out/sums"
run python "$venv" "${@:-tests/python}" &
for version in 3.8 3.13; do
    [ $# = 0 ] || continue
    python=$(find ~/.pyenv/versions/$version.*/bin/python "$(command -v python$version)" \
        2>/dev/null | head -1)
    env=build/venv-$version
    if [ -n "$python" ] && { [ -x $env/bin/pytest ] || { "$python" -m venv $env && $env/bin/pip \
        install --quiet --disable-pip-version-check numpy pytest; } >"$out/$version.txt" 2>&1; }; then
        run python$version $env/bin/python tests/python/test_calls.py tests/python/test_arrays.py \
            tests/python/test_lives.py
    else
        echo "python$version: not tried: no such Python here, or no numpy for it"
        echo 0 0 1 >>"$out/sums"
    fi
done
wait
awk '{ p += $1; f += $2; s += $3 }
    END { printf "python: %d passed, %d failed, %d skipped\n", p, f, s; exit f > 0 || NR == 0 }' "$out/sums"
