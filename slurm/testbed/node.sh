#!/usr/bin/env bash
# node on|off|kill-slurmd|start-slurmd|cut|mend|run nodeI [COMMAND...]
#   off          a power cut: all of the node's processes end at once
#   kill-slurmd  its daemon alone dies; the ranks that it started keep running
#   cut, mend    pull its network cable and plug it in again (--net)
#   run          a command on the node
# shellcheck disable=SC2154
set -e
action=${1:-} name=${2:-}
[ -n "$name" ] || { sed -n '3,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
shift 2
file=$dir/run/$name.pid
first() { pgrep -P "$(cat "$file")" | head -n 1; } # the node's process 1, as this machine numbers it
inside() { nsenter --target "$(first)" --net --uts --mount --pid -- "$@"; }
slurmd() { pgrep -P "$(first)" -x slurmd || inside pgrep -x slurmd; }

case $action in
on)
    [ ! -f "$file" ] || { echo "$name is on"; exit 0; }
    place=()
    # Not ip netns exec: that mounts a /sys without cgroups, and slurmd would not start.
    [ "$net" = 0 ] || place=(nsenter "--net=/run/netns/testbed-$name" --)
    setsid "${place[@]}" unshare --uts --mount --pid --fork --kill-child --mount-proc \
        bash "$dir/bin/node-init" "$name" </dev/null >>"$dir/log/console-$name.log" 2>&1 &
    echo $! >"$file"
    ;;
off)
    outer=$(cat "$file")
    kill -KILL "$(first)" "$outer"
    rm -f "$file"
    ;;
kill-slurmd) inside pkill -KILL -x slurmd ;;
start-slurmd) inside setsid env SLURM_CONF="$dir/etc/slurm.conf" slurmd -N "$name" ;;
cut) nsenter --net=/run/netns/testbed-controller ip link set "v${name#node}" down ;;
mend) nsenter --net=/run/netns/testbed-controller ip link set "v${name#node}" up ;;
run) inside "$@" ;;
*) echo "error: $action: expected on, off, kill-slurmd, start-slurmd, cut, mend or run" >&2; exit 2 ;;
esac
