#!/usr/bin/env bash
# controller kill|start: slurmctld dies, as in a crash, and comes back
# shellcheck disable=SC2154
set -e
case ${1:-} in
kill) kill -KILL "$(cat "$dir/run/slurmctld.pid")" ;;
start) "$dir/bin/in-cluster" slurmctld ;;
*) echo "error: expected controller kill or controller start" >&2; exit 2 ;;
esac
