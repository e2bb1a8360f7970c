#!/usr/bin/env bash
# A Slurm of two nodes on this machine's loopback, for tests: Debian's packages, as root, without systemd.
#
#   tests/slurm/up.sh install    the packages (with accounting, so that sacct has something to say)
#   tests/slurm/up.sh up         munge, MariaDB, slurmdbd, slurmctld, two slurmd
#   tests/slurm/up.sh down       stops what `up` has started, and nothing else
#
# Everything it writes is below SLURM_ROOT, but for munge's key, and a line of /etc/hosts that `down` takes out again; SLURM_CONF
# (SLURM_ROOT/etc/slurm.conf) is what commands need to find it.
set -euo pipefail

root=${SLURM_ROOT:-/tmp/distill-slurm}
host=$(hostname -s)
mark="# distill's Slurm on loopback"
export SLURM_CONF=$root/etc/slurm.conf
packages=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server)

install_packages() {
    if dpkg -s "${packages[@]}" >/dev/null 2>&1; then return; fi
    # maintainer scripts must not try to start services: a policy of ours unless the machine has one
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

wait_for() { # seconds, what, command...
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS >= until)); then
            echo "up.sh: $what did not come up; logs are in $root/log" >&2
            return 1
        fi
        sleep 0.2
    done
}

write_configs() {
    # Memory and cores are a claim (config_overrides): nothing is bound, and tests need more of them than a small
    # machine has. cred_expire: a requeued job starts again after 10 s instead of 120.
    cat >"$SLURM_CONF" <<CONF
ClusterName=distill
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=10
SlurmctldPort=16817
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool-%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
MinJobAge=600
KillWait=20
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    echo "CgroupPlugin=cgroup/v1" >"$root/etc/cgroup.conf"
    cat >"$root/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
DbdHost=localhost
DbdPort=16819
SlurmUser=root
LogFile=$root/log/slurmdbd.log
PidFile=$root/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=loopback
StorageLoc=slurm_accounting
CONF
    chmod 600 "$root/etc/slurmdbd.conf"
}

start_munge() {
    if [[ ! -s /etc/munge/munge.key ]]; then
        dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
    fi
    chown munge:munge /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
    install -d -o munge -g munge -m 755 /run/munge
    if munge -n >/dev/null 2>&1; then return; fi # the machine's own: it stays
    su -s /bin/sh munge -c '/usr/sbin/munged --num-threads 2'
    cp /run/munge/munged.pid "$root/run/munged.pid"
}

start_database() {
    install -d -o mysql -g mysql /run/mysqld "$root/db"
    if [[ ! -d $root/db/mysql ]]; then
        mariadb-install-db --user=mysql --datadir="$root/db" --skip-test-db >"$root/log/mariadb.log" 2>&1
    fi
    mariadbd --no-defaults --user=mysql --datadir="$root/db" --skip-networking --socket=/run/mysqld/mysqld.sock \
        --pid-file="$root/db/mariadb.pid" >>"$root/log/mariadb.log" 2>&1 &
    echo $! >"$root/run/mariadbd.pid"
    wait_for 30 mariadbd mariadb-admin ping
    mariadb -e "create database if not exists slurm_accounting;
        create user if not exists slurm@localhost identified by 'loopback';
        grant all on slurm_accounting.* to slurm@localhost;"
}

up() {
    down
    rm -rf "$root"
    mkdir -p "$root"/{etc,state,log,run}
    chmod 755 "$root"
    write_configs
    echo "127.0.0.1 $host n1 n2 $mark" >>/etc/hosts
    start_munge
    start_database
    # slurmdbd reads its config beside slurm.conf
    slurmdbd
    wait_for 30 slurmdbd sacctmgr -n list cluster
    sacctmgr -i add cluster distill >/dev/null 2>&1 || true
    slurmctld
    wait_for 30 slurmctld scontrol ping
    for node in n1 n2; do slurmd -N $node; done
    wait_for 30 "the nodes" bash -c '[[ $(sinfo -h -p main -t idle -o %D) == 2 ]]'
}

stop() { # pid file: asks, waits, insists
    local pid
    [[ -s $1 ]] || return 0
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$1"
}

down() {
    if grep -q "$mark" /etc/hosts; then # in place: a container's is mounted
        sed "/$mark/d" /etc/hosts >"$root/hosts" && cat "$root/hosts" >/etc/hosts
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do stop "$root/run/$name.pid"; done
}

case ${1:-} in
install) install_packages ;;
up) up ;;
down) down ;;
*) echo "usage: $0 install|up|down" >&2 && exit 2 ;;
esac
