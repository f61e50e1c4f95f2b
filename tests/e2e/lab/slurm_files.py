"""The text of every file that Slurm, sshd and SkyPilot read in the lab. Pure."""

from __future__ import annotations

from tests.e2e.lab.layout import (
    CLUSTER,
    CPUS_A_NODE,
    GPUS_A_NODE,
    LAB_ADDRESS,
    MEMORY_MB_A_NODE,
    NODES,
    PARTITION,
    UID,
    USER,
    Layout,
)


def texts(at: Layout) -> dict[str, str]:
    """Path below the lab's folder -> text."""
    return {
        "etc/slurm.conf": _slurm_conf(at),
        "etc/gres.conf": _gres_conf(at),
        "etc/prolog": _prolog(at),
        "etc/sshd_config": _sshd_config(at),
        "etc/hosts": _hosts(),
        "etc/passwd": f"root:x:0:0:root:/root:/bin/bash\nsshd:x:101:65534::/run/sshd:/bin/false\n"
        f"{USER}:x:{UID}:{UID}::{at.user_home}:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n",
        "etc/group": f"root:x:0:\n{USER}:x:{UID}:\nnogroup:x:65534:\n",
        # Not "!": sshd takes that for a locked account and refuses its keys.
        "etc/shadow": f"root:*:19000:0:99999:7:::\n{USER}:*:19000:0:99999:7:::\n",
        "home/.slurm/config": f"""\
Host {CLUSTER}
  HostName {LAB_ADDRESS}
  User {USER}
  IdentityFile {at / "etc/id"}
  IdentitiesOnly yes
""",
        # Controllers of services run below the API server: the lab has no machine for them.
        "home/.sky/config.yaml": "serve:\n  controller:\n    consolidation_mode: true\n",
        # SkyPilot would fetch these from GitHub; a file that is there it keeps.
        "home/.sky/catalogs/v8/common/accelerators.csv": "AcceleratorName,Clouds\n"
        + "".join(f"{gpu},\"['Kubernetes', 'Slurm']\"\n" for gpu in sorted({n.gpu for n in NODES})),
        "home/.sky/catalogs/v8/common/metadata.csv": "GPU,MemoryGB,Manufacturer\n"
        "H100,80,NVIDIA\nL4,24,NVIDIA\n",
    }


def _slurm_conf(at: Layout) -> str:
    nodes = "\n".join(
        f"NodeName={n.name} NodeAddr={n.address} CPUs={CPUS_A_NODE} RealMemory={MEMORY_MB_A_NODE}"
        f" Gres=gpu:{n.gpu.lower()}:{GPUS_A_NODE} State=UNKNOWN"
        for n in NODES
    )
    return f"""\
ClusterName={CLUSTER}
SlurmctldHost=lab({LAB_ADDRESS})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at / "munge/socket"}
CredType=cred/munge
StateSaveLocation={at / "state"}
SlurmctldPidFile={at / "state/slurmctld.pid"}
SlurmctldLogFile={at / "log/slurmctld.log"}
SlurmdSpoolDir={at / "spool/%n"}
SlurmdPidFile={at / "state/slurmd-%n.pid"}
SlurmdLogFile={at / "log/slurmd-%n.log"}
# The nodes have more of everything than this machine.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
KillWait=2
MinJobAge=60
PrologSlurmctld={at / "etc/prolog"}
{nodes}
PartitionName={PARTITION} Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
"""


def _gres_conf(at: Layout) -> str:
    return "".join(
        f"NodeName={n.name} Name=gpu Type={n.gpu.lower()} File={at.folder}/dev/gpu[0-{GPUS_A_NODE - 1}]\n"
        for n in NODES
    )


def _prolog(at: Layout) -> str:
    """Lays out on a node, in a second, what SkyPilot would download there for minutes."""
    return f"""\
#!/bin/bash
[ "$SLURM_JOB_USER" = {USER} ] || exit 0
case $SLURM_JOB_NAME in *[!A-Za-z0-9_.-]*|bash|sh|hostname|python3) exit 0;; esac
home="{at.user_home}/.sky_clusters/$SLURM_JOB_NAME"
runtime="/tmp/$SLURM_JOB_NAME"
mkdir -p "$home/.local/bin" "$home/.sky/wheels" "$runtime"
ln -sfn /usr/local/bin/uv "$home/.local/bin/uv"
ln -sfn "{at.install}/venv" "$runtime/skypilot-runtime"
ln -sfn "{at.install}/user" "$home/sky-user-env"
basename "$(ls -td "{at.folder}"/home/.sky/wheels/*/ | head -1)" > "$home/.sky/wheels/current_sky_wheel_hash"
chown -h {USER}:{USER} "{at.user_home}/.sky_clusters"
chown -hR {USER}:{USER} "$home" "$runtime"
exit 0
"""


def _sshd_config(at: Layout) -> str:
    return f"""\
ListenAddress {LAB_ADDRESS}
HostKey {at / "etc/hostkey"}
PidFile none
AuthorizedKeysFile {at / "etc/id.pub"}
AllowUsers {USER}
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
SetEnv SLURM_CONF={at / "etc/slurm.conf"} DETOSERVE_LAB={at.folder} PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
"""


def _hosts() -> str:
    lines = [("127.0.0.1", "localhost"), (LAB_ADDRESS, "lab")]
    lines += [(node.address, node.name) for node in NODES]
    return "".join(f"{address} {name}\n" for address, name in lines)
