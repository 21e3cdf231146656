"""What one node would run with: prints `node HOST fingerprint`, or `error: ...` for what it lacks.

Owns the checks of a node before ranks start; slurm/lib.sh compares the fingerprints of all nodes. Reads no
recipe: the ranks check theirs, and refuse it in one line. Imports neither torch nor megatron.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def fault(args: argparse.Namespace) -> str | None:
    """The first thing that this node lacks."""
    out = Path(args.out)
    if not out.is_dir():
        return f"CLSA_OUT={out} is not on this node: use a folder that all nodes see"
    probe = out / "logs" / f".{os.uname().nodename}.{os.getpid()}"
    try:
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        return f"CLSA_OUT={out} cannot be written: {error.strerror}"
    free = shutil.disk_usage(out).free / 1e9
    if free < args.free_gb:
        return f"CLSA_OUT={out} has {free:.0f} GB free, CLSA_MIN_FREE_GB is {args.free_gb:.0f}: make room"
    if args.gpus and (found := gpus()) < args.gpus:
        return f"{found} GPUs where CLSA_GPUS_PER_NODE is {args.gpus}: drain the node or lower it"
    for flag, path in needed_files(args):
        if not path.is_file():
            return f"{flag}: {path} is missing"
        if not os.access(path, os.R_OK):
            return f"{flag}: {path} cannot be read"
    return None


def needed_files(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Data (weights before prefixes are left out) and a tokenizer that is a file."""
    prefixes = [word for word in args.data_path if not word.replace(".", "").isdigit()]
    files = [("CLSA_DATA", Path(prefix + suffix)) for prefix in prefixes for suffix in (".idx", ".bin")]
    if args.tokenizer_model and not Path(args.tokenizer_model).is_dir():
        files.append(("CLSA_TOKENIZER", Path(args.tokenizer_model)))
    return files


def gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def fingerprint(args: argparse.Namespace) -> str:
    """Versions, and a hash of the code and of the files that every node must see alike."""
    digest = hashlib.sha256()
    folders = ("megatron_clsa", "kernels", "examples")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    for _, path in needed_files(args):
        digest.update(str(path.stat().st_size).encode())
        if path.suffix != ".bin":
            digest.update(path.read_bytes())
    versions = [f"{name}={_version(name)}" for name in PACKAGES]
    return " ".join([f"python={sys.version.split()[0]}", *versions, f"code={digest.hexdigest()[:12]}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--gpus", type=int, required=True, help="wanted on this node")
    parser.add_argument("--free-gb", type=float, required=True, help="wanted where the run is written")
    parser.add_argument("--data-path", nargs="*", default=[], help="prefixes of the training data")
    parser.add_argument("--tokenizer-model", help="tokenizer of the data")
    args = parser.parse_args()
    found = fault(args)
    host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    print(f"error: {host}: {found}" if found else f"node {host} {fingerprint(args)}", flush=True)


if __name__ == "__main__":
    main()
