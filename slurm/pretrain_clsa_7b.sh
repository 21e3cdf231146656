#!/bin/bash
# Pretrain the 7B model from scratch.
# From the checkout's root, with slurm/site.env in place:
#     sbatch --nodes 16 slurm/pretrain_clsa_7b.sh [flags of examples/pretrain_clsa.py]
# From another model's weights, which tools/from_hf.py converts: add --pretrained-checkpoint FOLDER.
# Any number of nodes: the recipe's layouts say how they are shared out. The job saves and goes on by itself
# at its time limit, after preemption, after a failure and after the loss of a node; docs/operations.md.
#SBATCH --job-name=pretrain_clsa_7b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@300
set -uo pipefail

CLSA_ROOT="${CLSA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}" # $0 is Slurm's copy, elsewhere
if [ ! -f "$CLSA_ROOT/slurm/lib.sh" ]; then
    echo "error: $CLSA_ROOT/slurm/lib.sh is missing: submit from the checkout's root, or set CLSA_ROOT" >&2
    exit 2
fi
source "$CLSA_ROOT/slurm/lib.sh"
clsa_settings pretrain_clsa_7b
clsa_train "$CLSA_ROOT/examples/pretrain_clsa.py" \
    --config "${CLSA_RECIPE:-$CLSA_ROOT/examples/recipes/clsa_7b.yaml}" --keep-last 3 --keep-every 10000 "$@"
