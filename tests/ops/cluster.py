"""A throw-away Slurm cluster of two emulated nodes on this host: no systemd, cgroups, database.

Owns the daemons, which it ends by their recorded pids. Needs slurm-wlm and munge, and root.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("n1", "n2")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/sock
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=20
GresTypes=gpu
{nodes}
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why no cluster can be started here, None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs Slurm ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return "needs root" if os.geteuid() else None


def command(*words: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | env)


class Cluster:
    """Started by entering, ended by leaving. `SLURM_CONF` points at it meanwhile."""

    def __enter__(self):
        # Not pytest's folder: that is closed to others, and munged wants every parent searchable.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm"))
        self.dir.chmod(0o711)
        for name in ("state", "spool", "gpu", "munge"):
            (self.dir / name).mkdir(mode=0o711)
        self._write_files()
        os.environ["SLURM_CONF"] = str(self.dir / "slurm.conf")
        self._start_munge()
        subprocess.run(["slurmctld", "-c"], check=True)
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.node_states() == {"idle"}, 60, lambda: str(self.node_states()))
        return self

    def _write_files(self):
        port = 20000 + os.getpid() % 10000
        host = socket.gethostname().split(".")[0]
        for gpu in range(8):  # Slurm wants device files; these are copies of /dev/null
            os.mknod(self.dir / "gpu" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} CPUs=64 "
            "RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"
            for number, node in enumerate(NODES, 1)
        )
        text = CONF.format(host=host, port=port, dir=self.dir, nodes=nodes)
        (self.dir / "slurm.conf").write_text(text)
        gres = [f"NodeName={node} Name=gpu File={self.dir}/gpu/gpu[0-7]" for node in NODES]
        (self.dir / "gres.conf").write_text("\n".join(["AutoDetect=off", *gres, ""]))

    def _start_munge(self):
        munge = self.dir / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = {
            "key-file": "key",
            "socket": "sock",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        flags = [f"--{flag}={munge / name}" for flag, name in files.items()]
        subprocess.run(["munged", *flags], check=True)

    def start_node(self, node: str):
        subprocess.run(["slurmd", "-N", node], check=True)

    def node_states(self) -> set[str]:
        return set(command("sinfo", "-h", "-N", "-p", "low", "-o", "%T").stdout.split())

    def pid(self, daemon: str) -> int:
        return int((self.dir / f"{daemon}.pid").read_text())

    def __exit__(self, *_):
        command("scancel", "-u", "root")
        time.sleep(1)
        files = [self.dir / f"slurmd.{node}.pid" for node in NODES]
        for file in (*files, self.dir / "slurmctld.pid", self.dir / "munge" / "pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        del os.environ["SLURM_CONF"]
        time.sleep(2)  # the daemons write their state before they end
        shutil.rmtree(self.dir, ignore_errors=True)


class Job:
    """A batch job, submitted on making."""

    def __init__(self, script: Path, cwd: Path, *words: str, flags: tuple = (), **env):
        made = subprocess.run(
            ["sbatch", "--parsable", *flags, str(script), *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=os.environ | env,
        )
        assert made.returncode == 0, made.stderr
        self.id, self.cwd = made.stdout.strip(), cwd

    @classmethod
    def of(cls, number: str, cwd: Path) -> "Job":
        """A job that something else has submitted."""
        job = cls.__new__(cls)
        job.id, job.cwd = number, cwd
        return job

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.cwd.glob(f"*-{self.id}.out"))

    def field(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\S+)", command("scontrol", "-o", "show", "job", self.id).stdout)
        return found and found[1]

    @property
    def state(self) -> str | None:
        return self.field("JobState")

    def processes(self) -> list[int]:
        """Pids on this host that the job has started."""
        mine, found = f"SLURM_JOB_ID={self.id}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mine in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def wait(self, condition, seconds: float = 240):
        wait_for(condition, seconds, lambda: f"job {self.id} is {self.state}\n{self.log}")
        return self

    def restarted(self):
        """Wait for a requeue and skip Slurm's 120 s before it.

        A second or two of them must pass: credentials are revoked and made by the second, and one that was
        made in the second of the requeue counts as revoked ("Killing non-startable batch job").
        """
        self.wait(lambda: self.state == "PENDING")
        time.sleep(2.5)

        def running_again() -> bool:
            if self.state == "PENDING":
                command("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            return self.state == "RUNNING" and int(self.field("Restarts")) > 0

        return self.wait(running_again)

    def done(self):
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(lambda: self.state in ended)


def wait_for(condition, seconds: float, said) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(said())
        time.sleep(0.1)
