#!/bin/sh
# SPDX-License-Identifier: MIT
# class: rest
# What `make install` leaves is enough to build and run a program with pkg-config, from another
# place than the tree; `make uninstall` leaves no file. Run from the root of the tree.
n=0
bad=0
root=$PWD
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

ok() { # ok STATUS WHAT
    n=$((n + 1))
    if [ "$1" = 0 ]; then
        echo "ok $n - $2"
    else
        bad=1
        echo "not ok $n - $2"
        sed 's/^/# /' "$tmp/log" 2>/dev/null | tail -15
    fi
}
# With the compiler of the build, or all of it would be built anew beside the other tests.
[ ! -e build/flags ] || CC=$(sed 's/ -std=.*//' build/flags)
export CC
quiet() { env -u MAKEFLAGS -u MAKELEVEL -u VARIANT "$@" >"$tmp/log" 2>&1; }

quiet make DEPS=0 DESTDIR="$tmp/root" PREFIX=/opt/x install
ok $? "make install with DESTDIR and PREFIX"
lib=$tmp/root/opt/x/lib
[ -e "$lib/libep.so.0" ] && [ -e "$lib/libep.a" ] && [ -e "$tmp/root/opt/x/include/ep.h" ]
ok $? "library, archive and header are there"
! grep -rqF "$root" "$lib/pkgconfig"
ok $? "libep.pc does not know the build tree"

# hardened FILE: addresses that the loader fills in are read-only, and the stack is no program.
hardened() {
    readelf -lW "$1" >"$tmp/log" && grep -q 'GNU_RELRO' "$tmp/log" &&
        grep 'GNU_STACK' "$tmp/log" | grep -q ' RW  *0x' &&
        readelf -dW "$1" >"$tmp/log" && grep -q 'BIND_NOW\|FLAGS_1.*NOW' "$tmp/log" &&
        readelf -sW "$1" >"$tmp/log" && grep -q '__stack_chk_fail' "$tmp/log" &&
        grep -q '_chk@' "$tmp/log"
}
if command -v readelf >/dev/null; then
    hardened "$lib/libep.so.0" && hardened "$tmp/root/opt/x/bin/ep" &&
        readelf -hW "$tmp/root/opt/x/bin/ep" | grep -q 'Type: *DYN'
    ok $? "library and program are hardened: stack, relocations, checked copies, any address"
else
    n=$((n + 1))
    echo "ok $n # SKIP no readelf"
fi

cat >"$tmp/user.c" <<'END'
#include <ep.h>
#include <stdio.h>
int main(void) {
    printf("%u\n", (unsigned)ep_version());
    return ep_version() ==
                   EP_VERSION_MAJOR * 10000 + EP_VERSION_MINOR * 100 + EP_VERSION_PATCH
               ? 0
               : 1;
}
END
cd "$tmp" || exit 1
if command -v pkg-config >/dev/null; then
    PKG_CONFIG_SYSROOT_DIR=$tmp/root
    PKG_CONFIG_PATH=$lib/pkgconfig
    export PKG_CONFIG_SYSROOT_DIR PKG_CONFIG_PATH
    shared=$(pkg-config --cflags --libs libep)
    static=$(pkg-config --static --cflags --libs libep)
    [ "$(pkg-config --modversion libep)" = "$(sed -n 's/^VERSION := //p' "$root/Makefile")" ]
    ok $? "pkg-config gives the version"
    # shellcheck disable=SC2086
    quiet ${CC:-cc} user.c -o user $shared && quiet env LD_LIBRARY_PATH="$lib" ./user
    ok $? "a program builds with pkg-config and runs on libep.so"
    # shellcheck disable=SC2086
    quiet ${CC:-cc} user.c -o user_static -Wl,-Bstatic $static -Wl,-Bdynamic && quiet ./user_static
    ok $? "the same with libep.a"
    for example in "$root"/examples/*.c; do
        [ -e "$example" ] || continue
        # shellcheck disable=SC2086
        quiet ${CC:-cc} "$example" -o example $shared -lm &&
            quiet env LD_LIBRARY_PATH="$lib" timeout 60 ./example
        ok $? "$(basename "$example") builds and runs against the installed library"
    done
else
    n=$((n + 1))
    echo "ok $n # SKIP no pkg-config"
fi
if [ -e "$tmp/root/opt/x/bin/ep" ]; then
    quiet "$tmp/root/opt/x/bin/ep" env
    ok $? "the installed ep runs"
fi
cd "$root" || exit 1
quiet make DEPS=0 DESTDIR="$tmp/root" PREFIX=/opt/x uninstall
ok $? "make uninstall"
[ -z "$(find "$tmp/root" ! -type d)" ]
ok $? "nothing is left"
echo "1..$n"
exit $bad
