#!/usr/bin/env bash
# The first process of a node: gives it its name, the cluster's host names, memory and local disk, and a slurmd.
# shellcheck disable=SC2154
hostname "$1"
mount --bind "$dir/etc/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$dir/disks/$1" && mount --bind "$dir/disks/$1" "$dir/disk"
. "$dir/env.sh"
slurmd -D -N "$1" &
while :; do sleep 86400 & wait $!; done # and reaps what is left to it
