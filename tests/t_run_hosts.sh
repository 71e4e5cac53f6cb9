#!/bin/sh
# SPDX-License-Identifier: MIT
# class: timed, long
# `ep run --hosts`: ranks on two hosts, which are network namespaces: what they find, who knows the key,
# whose failure ends whom, and that nothing is left on either when `ep run` is gone; and by a real sshd,
# where there is one. Needs root. TAP.
cd "$(dirname "$0")/.." || exit 1
. tests/tool.sh
hosts() { EP=$ep EP_NET_PROVIDER=fake sh examples/two_nodes.sh "$@"; }
hosts -n 2 -- true >"$tmp/out" 2>"$tmp/err"
[ $? = 77 ] && { echo "1..0 # skip $(head -1 "$tmp/err")"; exit 0; }

want 0 hosts -n 3 -- sh -c 'echo $RANK/$LOCAL_RANK/$WORLD_SIZE/$LOCAL_WORLD_SIZE/$MASTER_ADDR \
    $EP_JOB $EP_NET_PROVIDER $(ip -o -4 addr show up0 | grep -o "10.78.0.[12]/")' &&
    has '^\[0\] 0/0/3/2/10.78.0.1 .* fake 10.78.0.1/' && has '^\[1\] 1/1/3/2/10.78.0.1 .* 10.78.0.1/' &&
    has '^\[2\] 2/0/3/1/10.78.0.1 .* 10.78.0.2/' &&
    [ "$(cut -d' ' -f3 "$tmp/out" | sort -u | wc -l)" = 1 ]
ok "ranks of both hosts find their numbers, their host and one job"
want 0 hosts -n 2 -- sh -c "printf %s \"\$EP_JOB_KEY\" >$tmp/key.\$RANK
    tr '\\0' ' ' </dev/null; cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' |
    grep -c -F -f $tmp/key.\$RANK || true" &&
    [ "$(wc -c <"$tmp/key.0")" = 64 ] && cmp -s "$tmp/key.0" "$tmp/key.1" && has '^\[0\] 0$'
ok "both have the job's key, which is on no command line"
want 0 hosts -n 3 &&
    [ "$(grep -c 'every answer is right' "$tmp/out")" = 3 ]
ok "a layer runs across both"
want 0 hosts -n 2 -- printf '%s|' "it's" 'a "b" $c' '' && has "it's|a \"b\" \$c||"
ok "arguments arrive as they are"
want 7 hosts -n 4 -- sh -c "if [ \$RANK = 3 ]; then exit 7; fi; sleep $mark" &&
    says 'rank 3 exited with status 7' && says '10.78.0.2: part 1 exited' && gone "$mark"
ok "a rank that fails ends those of the other host, and its status is the result"
want 127 hosts -n 2 -- ./no-such-program && says no-such-program
ok "a program that is not there gives 127"
echo 'exit 255' >"$tmp/nobody"
want 255 "$ep" run --hosts a,b -n 2 --ssh "sh $tmp/nobody" -- true && says 'part . exited with status 255'
ok "a host that cannot be reached is a failure"
want 2 "$ep" run --hosts a,b,c -n 2 -- true && says 'no more than there are ranks'
ok "more hosts than ranks are refused"
want 2 "$ep" run --hosts=-oProxyCommand=x -n 2 -- true && says 'names with commas'
ok "an option of ssh is no host"
"$ep" run --part 0/2/localhost -n 1 -- true </dev/null 2>"$tmp/err"
[ $? = 1 ] && says 'no key came'
ok "a part without a key does not begin"
{ head -c 64 /dev/zero | tr '\0' k; sleep 1; } |
    "$ep" run --part 0/2/localhost -n 1 -- sleep "$mark" >"$tmp/out" 2>"$tmp/err"
[ $? = 129 ] && says 'connection to ep run has ended' && gone "$mark"
ok "a part ends when nobody is there who has started it"
hosts -n 4 -- sleep "$mark" >"$tmp/out" 2>"$tmp/err" &
for _ in $(seq 100); do # all four ranks are there
    [ "$(pgrep -fxc "sleep $mark")" = 4 ] && break
    sleep 0.1
done
kill -KILL "$(pgrep -f "^$ep run --hosts.*$mark" | head -1)" && gone "$mark"
ok "when ep run is killed nothing is left on either host"
wait

# ---- a real sshd in each of two namespaces
sshd=$(command -v sshd || command -v /usr/sbin/sshd)
reach() { # reach N: ssh gets through to host N
    for _ in $(seq 50); do
        ip netns exec "ep$$.1" ssh -F "$tmp/config" "10.78.0.$1" true 2>"$tmp/err" && return 0
        sleep 0.1
    done
    return 1
}
by_ssh() {
    for k in host user; do
        ssh-keygen -q -t ed25519 -N '' -f "$tmp/$k" || return 1
    done
    printf '10.78.0.%s ' 1 2 | sed 's/ $//; s/ /,/' >"$tmp/known"
    echo " $(cat "$tmp/host.pub")" >>"$tmp/known"
    cat >"$tmp/config" <<END
Port 2222
IdentityFile $tmp/user
UserKnownHostsFile $tmp/known
StrictHostKeyChecking yes
BatchMode yes
END
    for i in 1 2; do
        cat >"$tmp/sshd.$i" <<END
ListenAddress 10.78.0.$i:2222
HostKey $tmp/host
AuthorizedKeysFile $tmp/user.pub
PidFile $tmp/pid.$i
StrictModes no
UsePAM no
PermitRootLogin yes
END
        mkdir -p /run/sshd && ip netns exec "ep$$.$i" "$sshd" -r -f "$tmp/sshd.$i" -E "$tmp/log.$i" ||
            return 1
    done
    reach 1 && reach 2 &&
        want 0 ip netns exec "ep$$.1" "$PWD/$ep" run --hosts 10.78.0.1,10.78.0.2 \
            --ssh "ssh -F $tmp/config" -n 3 -- sh -c 'echo $RANK ${#EP_JOB_KEY} $SSH_CONNECTION' &&
        has '^\[1\] 1 64 .* 10.78.0.1 2222' && has '^\[2\] 2 64 .* 10.78.0.2 2222' &&
        want 7 ip netns exec "ep$$.1" "$PWD/$ep" run --hosts 10.78.0.1,10.78.0.2 \
            --ssh "ssh -F $tmp/config" -n 2 -- sh -c "[ \$RANK = 1 ] && exit 7; sleep $mark" &&
        { gone "$mark" || gone "$mark" || gone "$mark"; } # sshd takes its time to notice
}
if [ -x "$sshd" ] && command -v ssh-keygen >/dev/null; then
    trap 'for i in 1 2; do ip netns del "ep$$.$i"; kill "$(cat "$tmp/pid.$i")"; done 2>/dev/null
        rm -rf "$tmp"' EXIT
    for i in 1 2; do ip netns add "ep$$.$i"; done
    ip -n "ep$$.1" link add up0 type veth peer name up0 netns "ep$$.2"
    for i in 1 2; do
        ip -n "ep$$.$i" addr add "10.78.0.$i/24" dev up0
        ip -n "ep$$.$i" link set lo up
        ip -n "ep$$.$i" link set up0 up
    done
    by_ssh
    ok "over ssh: ranks run on both hosts, and end with the one that fails"
else
    n=$((n + 1))
    echo "ok $n # skip there is no sshd here"
fi
echo "1..$n"
