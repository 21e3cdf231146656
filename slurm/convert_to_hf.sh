#!/bin/bash
# Convert a run's newest checkpoint to a Hugging Face folder and compare the logits, on one node without a GPU:
#     sbatch slurm/convert_to_hf.sh RUN_FOLDER OUT_FOLDER [flags of tools/to_hf.py]
# With --dtype without the comparison.
#SBATCH --job-name=convert_to_hf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

CLSA_ROOT="${CLSA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" # $0 is Slurm's copy, elsewhere
if [ ! -f "$CLSA_ROOT/slurm/lib.sh" ]; then
    echo "error: $CLSA_ROOT/slurm/lib.sh is missing: submit from the checkout's root, or set CLSA_ROOT" >&2
    exit 2
fi
source "$CLSA_ROOT/slurm/lib.sh"
[ $# -ge 2 ] || clsa_refuse "give the run's folder and the folder to make: sbatch slurm/convert_to_hf.sh RUN OUT"
CLSA_OUT="$1"
[ -d "$CLSA_OUT" ] || clsa_refuse "$CLSA_OUT does not exist: give the folder of a run"
clsa_settings convert_to_hf
mapfile -t container < <(clsa_container "$@")
verify=(--verify) # compares fp32 logits
[[ " ${*:3}" != *' --dtype'* ]] || verify=()
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
clsa_cpus
exec srun --ntasks=1 "${container[@]}" "${CLSA_START[@]}" "$CLSA_ROOT/tools/to_hf.py" "$@" "${verify[@]}"
