#!/bin/sh
# SPDX-License-Identifier: MIT
# law.sh [--self-test] [ROOT]: the layer law of ARCHITECTURE.md, read from the #includes, and
# who alone may touch the environment, stderr, clocks, assembly and atomics, and open descriptors.
#
#   L0 src/base   L1 src/cu boot mem net   L2 src/run proxy   L3 src/ep
# A directory includes its own files, src/base, and the <dir>.h of lower layers; kernel/abi.h
# may be included from src/, kernels.h and lang*.h from src/run. kernel/ includes kernel/ only;
# tools/ ep.h and src/base/base.h, its gpu*.c also src/cu/cu.h, doctor.c src/net/net.h; examples/ ep.h, and
# examples/demo/, which is built into ep, tools/tool.h and tools/gpu.h; python/ ep.h alone. Each test
# says its class (scripts/run_tests.sh). The self-test plants violations in a copy: each must be caught.
#
# Also the dialect in which all of these are written: sizeof(x), and in conditions p and !p rather
# than p == NULL, no (void) before a call; in src/ EPI_TRY, too. In kernel/ every macro begins with
# K_ (guards with KERNEL_); a function, struct or macro has its name alone, in kernel/ and from tools/
# (the language, lang*.h, says a word once for each world); and addresses of peers are the
# language's business.
self_test=
[ "$1" = --self-test ] && self_test=1 && shift
root=${1:-$(dirname "$0")/..}
cd "$root" || exit 1

# FILE:LINE:TEXT of every line without comments; literals are emptied, but not in #include.
code_of() {
    awk '
    FNR == 1 { in_comment = 0 }
    {
        s = $0; out = ""; n = length(s); include = (s ~ /^[ \t]*#[ \t]*include/)
        for (i = 1; i <= n; i++) {
            c = substr(s, i, 1); two = substr(s, i, 2)
            if (in_comment) {
                if (two == "*/") { in_comment = 0; i++; out = out " " }
            } else if (two == "/*") { in_comment = 1; i++ }
            else if (two == "//") break
            else if (!include && (c == "\"" || c == "\047")) {
                q = c
                for (i++; i <= n && substr(s, i, 1) != q; i++)
                    if (substr(s, i, 1) == "\\") i++
                out = out q q
            } else out = out c
        }
        if (out ~ /[^ \t]/) print FILENAME ":" FNR ":" out
    }' "$@" </dev/null
}

# Each test says with whom it runs.
classes() {
    missing=0
    for t in tests/t_*.c tests/t_*.sh python/tests/t_*.py; do
        [ -e "$t" ] || continue
        sed -n 1,5p "$t" | grep -Eq 'class: (exclusive|(timed|rest)(, long)?)( |$)' && continue
        echo "$t:1: no line \"class: exclusive\", timed or rest (scripts/run_tests.sh)"
        missing=1
    done
    return $missing
}

law() {
    classes || { includes; return 1; }
    includes
}

includes() {
    files=$(find include src kernel tools examples tests python -name '*.[ch]' 2>/dev/null | LC_ALL=C sort)
    [ -n "$files" ] || { echo "law: no sources"; return 1; }
    # shellcheck disable=SC2086
    code_of $files | awk '
    BEGIN {
        layer["base"] = 0; layer["cu"] = 1; layer["boot"] = 1; layer["mem"] = 1
        layer["net"] = 1; layer["run"] = 2; layer["proxy"] = 2; layer["ep"] = 3
    }
    function bad(why) { print file ":" line ": " why; wrong = 1 }
    function check_include() {
        angle = code ~ /include[ \t]*</
        inc = code; sub(/^[^"<]*["<]/, "", inc); sub(/[">].*/, "", inc)
        if (file ~ /^include\//) {
            if (inc != "stddef.h" && inc != "stdint.h")
                bad("ep.h includes " inc "; only stddef.h and stdint.h are allowed")
        } else if (file ~ /^src\//) {
            if (angle) {
                if (inc ~ /cuda|nvrtc/) bad("CUDA headers are not used: " inc)
                if (inc ~ /^rdma\//) bad("what is needed of libfabric is in src/net/ofi.h: " inc)
                return
            }
            if (inc == "ep.h" || inc == "include/ep.h" || inc == "kernel/abi.h") return
            if (inc ~ /^kernel\//) {
                if (dir == "run" && inc ~ /^kernel\/(lang|kernels)/) return
                bad("src may include only kernel/abi.h of kernel/: " inc)
                return
            }
            if (dir == "" || index(inc, "src/" dir "/") == 1) return
            other = inc; sub(/^src\//, "", other); rest = other
            sub(/\/.*/, "", other); sub(/^[^\/]*\//, "", rest)
            if (inc !~ /^src\// || !(other in layer)) bad("unknown include, or its path does not begin at the root: " inc)
            else if (other == "base") return
            else if (layer[other] >= layer[dir])
                bad("src/" dir " (L" layer[dir] ") must not include src/" other " (L" \
                    layer[other] "): " inc)
            else if (rest != other ".h")
                bad("of src/" other " only " other ".h is for others: " inc)
        } else if (file ~ /^kernel\//) {
            if (file == "kernel/lang_host.h" && code ~ /include K_QUOTED\(K_LATE_MOVERS\)/) return
            if (angle) {
                if (file !~ /^kernel\/(lang_host|abi|lang)\.h$/)
                    bad("kernels know no system header: " inc)
            } else if (inc !~ /^kernel\// && !(inc == "ep.h" && file ~ /abi\.h$/))
                bad("kernel/ includes only \"kernel/...\": " inc)
        } else if (file ~ /^tools\//) {
            if (inc == "src/cu/cu.h" && file ~ /^tools\/gpu[^\/]*\.c$/) return
            if (inc == "src/net/net.h" && file == "tools/doctor.c") return
            if (!angle && inc ~ /\// && inc !~ /^tools\// && inc != "src/base/base.h")
                bad("tools/ includes ep.h and src/base/base.h only, its gpu*.c also " \
                    "src/cu/cu.h, doctor.c src/net/net.h: " inc)
        } else if (file ~ /^examples\//) {
            if (angle || inc == "ep.h") return
            if (file ~ /^examples\/demo\// && inc ~ /^(examples\/demo\/|tools\/(tool|gpu)\.h$)/)
                return
            bad("examples include ep.h only, demo/ also tools/tool.h and tools/gpu.h: " inc)
        } else if (file ~ /^python\// && !angle && inc !~ /^(ep|binding|bindings|dlpack)\.h$/) {
            bad("python/ sees only ep.h, and its own headers: " inc)
        }
    }
    # The name that a line at file scope defines; "" for none. A line that ends in ";" only declares.
    function defined_name(    s) {
        s = code
        if (s ~ /^[ \t]*#[ \t]*define[ \t]/) sub(/^[ \t]*#[ \t]*define[ \t]+/, "", s)
        else if (s ~ /^(struct|enum)[ \t]+[A-Za-z0-9_]+[ \t]*\{/) sub(/^(struct|enum)[ \t]+/, "", s)
        else if (s ~ /^[A-Za-z_]/ && s !~ /;[ \t]*$/ && s ~ /[a-z0-9_]\(/ && s !~ /^[A-Z_a-z]+\(/) {
            sub(/\(.*/, "", s); sub(/.*[ \t*]/, "", s)
        } else return ""
        sub(/[^A-Za-z0-9_].*/, "", s)
        return s
    }
    function note_name(    name) {
        name = defined_name()
        if (name == "") return
        if ((name in owner) && owner[name] != file && (owner[name] file) ~ /kernel/)
            bad(name " is defined in " owner[name] ", too")
        owner[name] = file
    }
    # A function of src/ has a name of its own there, so that a reader finds the right one.
    function note_function(    name) {
        if (code !~ /^static[ \t].*\(/ || (name = defined_name()) == "") return
        if ((name in src_owner) && src_owner[name] != file)
            bad(name "() is defined in " src_owner[name] ", too")
        src_owner[name] = file
    }
    function check_kernel() {
        if (code ~ /^[ \t]*#[ \t]*define[ \t]/ && code !~ /define[ \t]+(K_|KERNEL_|_Static_assert )/)
            bad("macros of kernel/ begin with K_")
        if (file !~ /^kernel\/lang[^\/]*\.h$/) {
            if (code ~ /(\.|->)address[^A-Za-z0-9_]/) bad("addresses of peers belong to kernel/lang*.h")
            note_name()
        }
    }
    function check_dialect() {
        if (padded ~ word "sizeof[ \t]+[^( \t]") bad("sizeof(x), with parentheses")
        if (code ~ /==[ \t]*NULL|NULL[ \t]*[=!]=/ ||
            code ~ /[A-Za-z0-9_\]][ \t]*!=[ \t]*NULL[ \t]*(\)[ \t]*\{|\?|&&|\|\||;.*\))/)
            bad("p and !p, not a comparison with NULL")
        if (code ~ /\(void\)[ \t]*[A-Za-z][A-Za-z0-9_.>-]*[ \t]*\(/)
            bad("a result that is ignored needs no (void)")
        if (file !~ /^src\//) return
        if (file != tail_file) tail = ""
        tail_file = file
        dense = code; gsub(/[ \t]/, "", dense)
        tail = substr(tail dense, length(tail dense) > 400 ? length(tail dense) - 399 : 1)
        if (tail ~ /st=[^;{}]*;if\(st!=EP_OK\)\{returnst;\}$/ ||
            tail ~ /if\(st==EP_OK\)\{st=[^;{}]*;\}returnst;$/ ||
            tail ~ /return[^;]*st==EP_OK\?[^;]*:st;$/)
            bad("EPI_TRY where a failed status is returned and nothing else")
    }
    {
        split($0, part, ":"); file = part[1]; line = part[2]
        code = substr($0, length(file) + length(line) + 3)
        dir = ""
        if (file ~ /^src\/[^\/]*\//) {
            dir = file; sub(/^src\//, "", dir); sub(/\/.*/, "", dir)
            if (!(dir in layer)) bad("src/" dir " has no layer; add it to scripts/law.sh")
        }
        if (code ~ /^[ \t]*#[ \t]*include/) { check_include(); next }
        word = "[^A-Za-z0-9_]"
        padded = " " code " "
        if (file !~ /^include\//) check_dialect()
        if (file ~ /^tests\//) next
        if (file !~ /^examples\// && file != "src/base/opt.c" &&
            padded ~ word "(secure_)?getenv[ \t]*\\(")
            bad("only src/base/opt.c reads the environment")
        if (file ~ /^(src|kernel)\// && file != "src/base/log.c" &&
            (padded ~ word "(stderr|STDERR_FILENO)" word || padded ~ word "perror[ \t]*\\(" ||
             padded ~ word "(write|dprintf)[ \t]*\\([ \t]*2[ \t]*,"))
            bad("only src/base/log.c writes to stderr")
        if (file ~ /^(src|kernel)\// && file != "src/base/time.c" &&
            file !~ /^kernel\/lang_/ &&
            (padded ~ word "(clock_gettime|gettimeofday|timespec_get|__?rdtscp?)[ \t]*\\(" ||
             padded ~ word "(time[ \t]*\\([ \t]*(NULL|0|&)|clock[ \t]*\\([ \t]*\\))"))
            bad("only src/base/time.c reads a clock")
        if (file ~ /^src\// && file != "src/base/log.c" && code !~ /epi_fd_keep\(/ &&
            padded ~ "[^A-Za-z0-9_>.](socket|socketpair|accept4?|memfd_create|eventfd|pipe2?|" \
                     "epoll_create1?|timerfd_create|signalfd|inotify_init1?|pidfd_open|dup|open|" \
                     "openat|creat|fopen)[ \t]*\\(")
            bad("a descriptor is opened as epi_fd_keep(open(...)), which keeps it off stderr and " \
                "out of children")
        if (file !~ /^kernel\/lang_/ && file !~ /^examples\// &&
            (padded ~ word "(asm|__asm|__asm__)" word || padded ~ /__atomic_|__sync_|__nv_atomic/))
            bad("assembly and builtin atomics belong to kernel/lang_*.h")
        if (file ~ /^kernel\/.*\.k\.c$/ && padded ~ word "(_Atomic|volatile)" word)
            bad("kernels hand off through the language, not _Atomic or volatile")
        if (file ~ /^kernel\// && padded ~ word "epi_")
            bad("kernels call nothing above them but through struct k_hooks")
        if (file ~ /^kernel\//) check_kernel()
        else if (file ~ /^(tools|examples)\//) note_name()
        else if (file ~ /^src\//) note_function()
    }
    END { exit wrong }'
}

if [ -z "$self_test" ]; then
    law && echo "ok: the layer law holds" && exit 0
    exit 1
fi

tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
cp -r include src kernel tools examples tests python "$tmp/"
cd "$tmp" || exit 1
if ! law >clean.txt; then
    cat clean.txt
    echo "law self-test: the tree itself breaks the law"
    exit 1
fi
num=0
# Writes a line at the end of FILE, in whose path zz is the line's number: all are planted at once.
put() { # put KIND FILE LINE-OF-CODE
    num=$((num + 1))
    file=$(echo "$2" | sed "s/zz/zz$num/g")
    mkdir -p "${file%/*}"
    printf '%s\n' "$3" >>"$file"
    printf '%s %s %s\n' "$1" "$file" "$3" >>planted.txt
}
plant() { put plant "$@"; } # must be caught, and named by file
spare() { put spare "$@"; } # must not be caught
plant include/ep.h '#include <cuda.h>'
plant src/base/zz.c '#include "src/boot/boot.h"'
plant src/mem/zz.c '#include "src/boot/boot.h"'
plant src/run/zz.c '#include "src/proxy/proxy.h"'
plant src/run/zz.c '#include "src/ep/ep.h"'
plant src/ep/zz.c '#include "src/mem/map.h"'
plant src/ep/zz.c '#include "kernel/lang.h"'
plant src/ep/zz.c '#include "kernel/kernels.h"'
plant src/zz/zz.c 'int x;'
plant kernel/zz.k.c '#include <stdint.h>'
plant kernel/zz.k.c '#include "src/base/base.h"'
plant kernel/zz.k.c 'static volatile int x;'
plant kernel/zz.h 'int64_t epi_now_ns(void);'
plant tools/zz.c '#include "src/run/run.h"'
plant tools/zz.c '#include "src/cu/cu.h"'
plant tools/zz.c '#include "src/net/net.h"'
plant src/net/zz.c '#include <rdma/fabric.h>'
plant tools/gpu.h '#include "src/cu/cu.h"'
plant tools/gpu_zz.c '#include "src/cu/driver.h"'
plant examples/zz.c '#include "src/base/base.h"'
plant tests/t_zz.c 'int x; /* class: fast */'
plant tests/t_zz.sh 'echo 1..0'
plant examples/zz.c '#include "tools/tool.h"'
plant examples/demo/zz.c '#include "tools/bench.h"'
plant python/ep/src/zz.c '#include "src/base/base.h"'
plant src/ep/zz.c '#include "handle.h"'
plant src/ep/zz.c 'const char *x = getenv("HOME");'
plant tools/zz.c 'const char *x = getenv("HOME");'
plant src/ep/zz.c '/* a */ fprintf(stderr, "x"); /* b */'
plant src/ep/zz.c 'write(2, "x", 1);'
plant src/mem/zz.c 'int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);'
plant src/cu/zz.c 'FILE *f = fopen(path, "re");'
plant src/ep/zz.c 'clock_gettime(CLOCK_MONOTONIC, &now);'
plant src/ep/zz.c '__asm__ volatile("" ::: "memory");'
plant src/run/zz.c '__atomic_store_n(&x, 1, __ATOMIC_RELEASE);'
plant kernel/zz.k.c '__atomic_store_n(&x, 1, __ATOMIC_RELEASE);'
plant kernel/zz.k.c '#define PART 1'
plant kernel/zz.k.c 'static K_FN void combine_run(struct k_thread *k) {'
plant kernel/zz.k.c 'struct sum_feed {'
plant kernel/zz.k.c '#define K_TO_SELF 3'
plant tools/zz.c 'static void dispatch_run(void) {'
plant kernel/zz.k.c '    const k_u64 x = peer.address;'
plant src/ep/zz.c 'size_t x = sizeof x;'
plant src/ep/zz.c 'if (p == NULL) {'
plant src/ep/zz.c 'while (p != NULL && p->next) {'
plant src/ep/zz.c '(void)pthread_join(thread, NULL);'
plant tests/zz.c 'if (p == NULL) {'
plant src/cu/zz.c 'ep_status st = f(a, b); if (st != EP_OK) { return st; }'
plant src/cu/zz.c 'if (st == EP_OK) { st = f(a, b); } return st;'
plant src/cu/zz.c 'return st == EP_OK ? f(a, b) : st;'
plant src/run/zz.c 'static void await_turn(int x) {'
spare src/ep/zz.c '/* getenv("X"), __atomic_load_n and stderr in a comment */ // asm'
spare src/ep/zz.c 'const char *x = "getenv( stderr asm clock_gettime(";'
spare src/ep/zz.c 'bool x = p != NULL;'
spare src/boot/zz.c '    int s = epi_fd_keep(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));'
spare src/boot/zz.c '    EPI_TRY(b->backend->open(b)); epi_cu_open(); make.open(x);'
spare src/ep/zz.c 'if ((p = strchr(s, c)) != NULL) {'
spare src/ep/zz.c '#include "src/mem/mem.h"'
spare src/run/zz.c '#include "kernel/abi.h"'
spare src/run/zz.c '#include "kernel/kernels.h"'
spare tools/zz.c '#include "src/base/base.h"'
spare tools/gpu_zz.c '#include "src/cu/cu.h"'
law >caught.txt && { echo "law self-test: nothing was caught"; exit 1; }
bad=0
while read -r kind file code; do
    if grep -q "^$file:" caught.txt; then found=plant; else found=spare; fi
    [ $kind = $found ] && continue
    echo "law self-test: $file is to be a $kind: $code"
    grep "^$file:" caught.txt
    bad=1
done <planted.txt
[ $bad = 0 ] && echo "ok: law self-test, $num plants"
