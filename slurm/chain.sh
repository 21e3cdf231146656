#!/bin/bash
# Submit N jobs of one script that run one after the other, each going on where the one before ended:
#     slurm/chain.sh 5 [flags of sbatch] slurm/pretrain_clsa_7b.sh [flags]
# For clusters that do not allow a requeue (CLSA_REQUEUE=0). Jobs that find the run finished end at once;
# `scancel --name NAME` ends the whole chain.
set -euo pipefail

script=''
for word in "${@:2}"; do
    if [ -z "$script" ] && [ -f "$word" ]; then script="$word"; fi
done
if [ -z "$script" ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: slurm/chain.sh NUMBER [flags of sbatch] SCRIPT [flags], NUMBER 1 or more, SCRIPT a file" >&2
    exit 2
fi
number=$1
shift
for ((job = 1; job <= number; job++)); do
    sbatch --dependency=singleton "$@"
done
