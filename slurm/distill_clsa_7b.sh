#!/bin/bash
# Take a dense 7B model through indexer warm-up and sparse adaptation.
# From the checkout's root, with slurm/site.env in place:
#     sbatch --nodes 16 slurm/distill_clsa_7b.sh [flags of examples/distill.py]
# It starts from dense weights: sbatch slurm/distill_clsa_7b.sh --pretrained-checkpoint FOLDER.
# Any number of nodes: the recipe's layouts say how they are shared out. The job saves and goes on by itself
# at its time limit, after preemption, after a failure and after the loss of a node; docs/operations.md.
#SBATCH --job-name=distill_clsa_7b
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
clsa_settings distill_clsa_7b
clsa_train "$CLSA_ROOT/examples/distill.py" \
    --config "${CLSA_RECIPE:-$CLSA_ROOT/examples/recipes/clsa_7b.yaml}" \
    --phases warmup,sparse --keep-last 3 --keep-every 10000 "$@"
