# Sourced by up: the cluster's configuration and its tools, from the variables that up has read.
# shellcheck shell=bash disable=SC2154

controller=127.0.0.1 controller_host=$(hostname -s)
address() { echo 127.0.0.1; }
port() { echo $((17000 + $1)); }
if [ "$net" = 1 ]; then
    controller=10.77.0.254 controller_host=slurmctl
    address() { echo "10.77.0.$1"; }
    port() { echo 16818; }
fi

{
    if [ "$net" = 1 ]; then printf '127.0.0.1 localhost\n%s %s\n' "$controller" "$controller_host"; else
        grep -vE '[[:space:]]node[0-9]+' /etc/hosts
    fi
    for i in $(seq "$nodes"); do echo "$(address "$i") node$i"; done
} >"$dir/etc/hosts"

gpu() { [ "$gpus" = 0 ] || echo "$1"; }
cat >"$dir/etc/slurm.conf" <<END
ClusterName=testbed
SlurmctldHost=$controller_host($controller)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also what a requeued job waits; less than 5 is refused
AuthInfo=socket=$dir/run/munge.sock,cred_expire=$wait
# daemons and clients bind the address of their own name, not 0.0.0.0
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
MailProg=/bin/true
# nodes may claim more CPUs than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
$(gpu GresTypes=gpu)
# quick decisions
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=$silent
KillWait=10
MinJobAge=3600
JobRequeue=1
# a job of partition high evicts one of partition low: first --signal's signal, after GraceTime the end
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$controller
AccountingStoragePort=16819
AccountingStoragePass=$dir/run/munge.sock
# a job needs an account of its user, and one above a limit waits
AccountingStorageEnforce=associations,limits,qos
$(gpu AccountingStorageTRES=gres/gpu)
$(for i in $(seq "$nodes"); do
    echo "NodeName=node$i NodeAddr=$(address "$i") Port=$(port "$i") CPUs=$cpus RealMemory=$memory" \
        "$(gpu "Gres=gpu:$gpu_type$gpus") State=UNKNOWN"
done)
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END

: >"$dir/etc/gres.conf"
if [ "$gpus" != 0 ]; then # a GPU needs a character device: one like /dev/null does
    for i in $(seq 0 $((gpus - 1))); do mknod "$dir/dev/gpu$i" c 1 3; done
    files="$dir/dev/gpu[0-$((gpus - 1))]"
    [ "$gpus" != 1 ] || files="$dir/dev/gpu0"
    printf 'AutoDetect=off\nName=gpu %s File=%s\n' "${gpu_type:+Type=${gpu_type%:}}" "$files" >"$dir/etc/gres.conf"
fi

cat >"$dir/etc/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
DbdHost=$controller_host
DbdAddr=$controller
DbdPort=16819
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommunicationParameters=NoInAddrAny
END
chmod 600 "$dir/etc/slurmdbd.conf"
# SLURM's clients look for DNS records where SLURM_CONF is not set.
printf 'export SLURM_CONF=%s\n' "$dir/etc/slurm.conf" >"$dir/env.sh"
printf 'dir=%s net=%s nodes=%s controller=%s\n' "$dir" "$net" "$nodes" "$controller" >"$dir/run/variables"

enter=
[ "$net" = 0 ] || enter="nsenter --target \"\$(cat $dir/run/controller.pid)\" --net --uts --mount --wdns=\"\$PWD\" --"
cat >"$dir/bin/in-cluster" <<END
#!/usr/bin/env bash
# in-cluster COMMAND...: run it where the cluster's clients can run
. $dir/env.sh
exec $enter "\$@"
END
for tool in node node-init network controller; do
    { printf '#!/usr/bin/env bash\n'; printf '. %s/run/variables\n' "$dir"; tail -n +2 "$here/$tool.sh"; } >"$dir/bin/$tool"
done
chmod 755 "$dir"/bin/*
