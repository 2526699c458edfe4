#!/usr/bin/env bash
# network up|down: a bridge in the namespace of the controller, and a cable from it to each node
# shellcheck disable=SC2154
set -e
bridge() { nsenter --net=/run/netns/testbed-controller "$@"; }
if [ "$1" = down ]; then
    for name in controller $(seq -f 'node%g' "$nodes"); do ip netns del "testbed-$name" 2>/dev/null || true; done
    exit 0
fi
ip netns add testbed-controller
bridge ip link set lo up
bridge ip link add bridge type bridge
bridge ip addr add "$controller/24" dev bridge
bridge ip link set bridge up
for i in $(seq "$nodes"); do
    ip netns add "testbed-node$i"
    bridge ip link add "v$i" type veth peer name eth0 netns "testbed-node$i"
    bridge ip link set "v$i" master bridge up
    nsenter --net="/run/netns/testbed-node$i" sh -c \
        "ip link set lo up; ip addr add 10.77.0.$i/24 dev eth0; ip link set eth0 up"
done
setsid nsenter --net=/run/netns/testbed-controller -- unshare --uts --mount bash -c \
    "hostname slurmctl; mount --bind $dir/etc/hosts /etc/hosts; touch $dir/run/controller.ready; exec sleep infinity" \
    </dev/null >/dev/null 2>&1 &
echo $! >"$dir/run/controller.pid"
for _ in $(seq 100); do [ -f "$dir/run/controller.ready" ] && exit 0; sleep 0.05; done
echo "the controller's namespace was not made" >&2
exit 1
