#!/bin/sh
# SPDX-License-Identifier: MIT
# soak.sh: the plain tests again and again, each round with another seed and TAP_EFFORT=20, for
# SOAK_SECONDS (600), with hundreds of scenes of the fault storm (tests/storm.h) in each. Stops at
# the first round that fails and says how to repeat it.
cd "$(dirname "$0")/.." || exit 1
limit=$(($(date +%s) + ${SOAK_SECONDS:-600}))
TAP_EFFORT=${TAP_EFFORT:-20}
TAP_TIMEOUT_SCALE=${TAP_TIMEOUT_SCALE:-20}
export TAP_EFFORT TAP_TIMEOUT_SCALE
round=0
while [ "$(date +%s)" -lt $limit ] || [ $round = 0 ]; do
    EP_SEED=${EP_SEED_FIRST:-$(date +%s)}$round
    export EP_SEED
    echo "round $round, EP_SEED=$EP_SEED"
    scripts/run_tests.sh || {
        echo "to repeat: EP_SEED=$EP_SEED TAP_EFFORT=$TAP_EFFORT scripts/run_tests.sh"
        exit 1
    }
    round=$((round + 1))
done
echo "soak: $round rounds"
