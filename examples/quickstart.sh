#!/usr/bin/env bash
# Trains a small CLSA through all four phases on two CPU processes, exports it, reloads it, samples from it.
# Owns the order of things; every stage is a command that also runs alone. Text: Python's standard library.
set -euo pipefail

usage="usage: bash examples/quickstart.sh [--out DIR]

Makes .venv in the checkout if it is missing (minutes, once), then takes about three minutes on two cores
and leaves DIR/hf, DIR/metrics.jsonl, DIR/report.json and DIR/loss.png. Default DIR: runs/quickstart in the
checkout. The same command again goes on where it was stopped. Exit codes: 0 all claims shown, 2 bad input,
75 stopped by a signal and saved, 1 anything else, such as a claim that was not shown."

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="$root/runs/quickstart"
while [ $# -gt 0 ]; do
    case "$1" in
        --out)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "--out needs a folder: bash examples/quickstart.sh --out DIR"
            out="$2"
            shift 2
            ;;
        --out=?*)
            out="${1#--out=}"
            shift
            ;;
        -h | --help)
            printf '%s\n' "$usage"
            exit 0
            ;;
        *) fail "unknown argument $1: the one flag is --out DIR" ;;
    esac
done

# A folder of this script is known by data/, which is made first.
if [ -e "$out" ] && [ ! -d "$out" ]; then
    fail "--out $out is a file: name a folder"
fi
if [ -d "$out" ] && [ ! -d "$out/data" ] && [ -n "$(ls -A "$out")" ]; then
    fail "--out $out holds something else: name a new folder, or an earlier quickstart's to go on"
fi
mkdir -p "$out/data" 2>/dev/null || fail "--out $out cannot be made: name a folder that you may write to"
out="$(cd "$out" && pwd -P)"
exec 8<"$out"
flock --nonblock 8 || fail "--out $out: another quickstart is running there; wait, or name another"

source "$root/tools/environment.sh"
clsa_environment
cd "$root"
# The same run on every machine: two processes of one thread each, on the CPU.
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TORCH_CPP_LOG_LEVEL=ERROR

data="$out/data"
log="$out/quickstart.log"
date >>"$log"

# stage NAME COMMAND...: runs it into the log, shows the end of its output only if it fails.
stage() {
    local name="$1" started=$SECONDS status=0
    shift
    printf '== %s\n' "$name" | tee -a "$log"
    "$@" || status=$?
    [ "$status" != 75 ] || fail "$name was stopped and saved: the same command goes on" 75
    if [ "$status" != 0 ]; then
        tail -n 5 "$log" >&2
        fail "$name stopped with exit code $status; everything it said is in $log" "$status"
    fi
    printf '   %d s\n' "$((SECONDS - started))"
}

prepare() {
    local text="$data/corpus.jsonl" prefix="$data/corpus"
    [ -f "$text" ] || python -m megatron_clsa.data.corpus "$text" || return
    [ -f "$data/tokenizer.model" ] || python tools/train_tokenizer.py --input "$text" \
        --output "$data/tokenizer.model" --vocab-size 2048 --max-bytes 4000000 || return
    [ -f "$prefix.manifest.json" ] || python tools/preprocess_data.py --input "$text" --overwrite \
        --output-prefix "$prefix" --tokenizer-model "$data/tokenizer.model" --workers 2
}

# Says of Megatron's output only which phase runs and how the validation loss goes.
train() {
    python examples/distill.py --nproc-per-node 2 --config examples/recipes/quickstart.yaml \
        --out "$out" --data-path "$data/corpus" --tokenizer-model "$data/tokenizer.model" 2>&1 \
        | tee -a "$log" \
        | awk 'match($0, /phase [0-9]+ [a-z_]+: .*/) {print "   " substr($0, RSTART); fflush()}
               /^evaluation at step / {print "     " $0; fflush()}'
}

convert() {
    python tools/to_hf.py "$out" "$out/hf" --tokenizer "$data/tokenizer.model" --verify --force
}

sample() {
    python examples/generate.py "$out/hf" --max-new-tokens 64 --prompt 'def read(self, size=-1):
        """' >"$out/sample.txt"
}

quietly() {
    "$@" >>"$log" 2>&1
}

stage "corpus, tokenizer, dataset" quietly prepare
stage "training" train
stage "export to Hugging Face, logits compared" quietly convert
stage "reload and sample" sample
sed 's/^/   | /' "$out/sample.txt"
stage "picture" quietly python tools/plot_run.py "$out/metrics.jsonl" --out "$out/loss.png"
gap="$(sed -n 's/^verified: logits differ by at most \([^ ]*\) .*/\1/p' "$log" | tail -n 1)"

python -m megatron_clsa.training.report --metrics "$out/metrics.jsonl" --report "$out/report.json" \
    --logits-gap "${gap:-inf}" || exit $?
echo "All claims are shown, in $SECONDS s: $out/report.json, $out/loss.png, $out/hf, $out/sample.txt"
