#!/bin/sh
# SPDX-License-Identifier: MIT
# cov.sh [VARIANT]: line coverage from the last run of VARIANT, san or cov (the default), of src/
# (without the libfabric glue and what only a GPU runs: src/cu, src/run/gpu.c, src/ep/cuda.c) and
# kernel/ (without the GPU's lang_cuda.h); fails below COV_MIN (90) percent. `make check-gpu` runs
# the rest.
# build/logs/cov.txt lists every file, build/logs/cov-missed.txt every line not run.
cd "$(dirname "$0")/.." || exit 1
dir=build/${1:-cov}
mkdir -p build/logs
# A header's lines are spread over objects, so counts are merged by file and line; an object
# that never ran counts too, through its notes file.
rm -f build/logs/cov-missed.txt
find "$dir/obj/src" "$dir/obj/kernel" -name '*.gcno' 2>/dev/null |
    xargs -r gcov -t -p 2>/dev/null |
    awk '
    { n = index($0, ":"); count = substr($0, 1, n - 1); rest = substr($0, n + 1)
      m = index(rest, ":"); line = substr(rest, 1, m - 1) + 0; text = substr(rest, m + 1) }
    line == 0 && text ~ /^Source:/ {
        file = substr(text, 8)
        use = file ~ /^(src|kernel)\// && file !~ /^src\/(cu\/|run\/gpu|ep\/cuda)/ && file !~ /^src\/net\/.*fabric/ &&
            file !~ /lang_cuda/
        next
    }
    !use || line == 0 { next }
    { gsub(/[ *]/, "", count) }
    count == "-" || count == "" { next }
    { key = file ":" line
      if (!(key in seen)) { seen[key] = 1; lines[file]++ }
      if (count !~ /^[#=]/ && !(key in hit)) { hit[key] = 1; hits[file]++ }
      source[key] = text }
    END {
        for (f in lines) {
            printf "%6.1f %% %5d of %5d  %s\n", 100 * hits[f] / lines[f], hits[f], lines[f], f
            all += lines[f]; run += hits[f]
        }
        for (k in seen) if (!(k in hit)) print k ":" source[k] >"build/logs/cov-missed.txt"
        printf "%6.1f %% %5d of %5d  TOTAL\n", all ? 100 * run / all : 0, run, all
    }' >build/logs/cov.txt
sort -n -o build/logs/cov.txt build/logs/cov.txt
[ -e build/logs/cov-missed.txt ] && sort -t: -k1,1 -k2n -o build/logs/cov-missed.txt \
    build/logs/cov-missed.txt
grep -v TOTAL build/logs/cov.txt | head -15
grep TOTAL build/logs/cov.txt | sed 's/ *\(.*\)  TOTAL/coverage: \1 lines/'
awk -v min="${COV_MIN:-90}" '/TOTAL/ { found = 1; bad = $1 < min }
    END { if (!found || bad) { print "coverage below " min " %"; exit 1 } }' build/logs/cov.txt
