# shellcheck shell=bash
# What the scripts in this folder share: settings, checks before start, ranks, signals, restarts. Sourced.
# Owns no model or data flag: those are the recipe's. Site settings are in site.env (see site.env.example).
#
# Exit codes of the trainer, kept by the job: 0 done; 2 the same command cannot succeed (bad input, full disk),
# never repeated; 75 saved after a signal, run again; anything else failed, run again within the budget.

readonly CLSA_DONE=0 CLSA_BAD_INPUT=2 CLSA_SAVED=75
readonly CLSA_SETTINGS=" CLSA_CONTAINER CLSA_DATA CLSA_GPUS_PER_NODE CLSA_MAX_RESTARTS CLSA_MIN_FREE_GB\
 CLSA_MOUNTS CLSA_OUT CLSA_PYTHON CLSA_RECIPE CLSA_REQUEUE CLSA_RUNS CLSA_TOKENIZER "

clsa_say() {
    printf '[%(%F %T)T job %s restart %s] %s\n' -1 "${SLURM_JOB_ID:-none}" "${SLURM_RESTART_COUNT:-0}" "$*"
}

clsa_refuse() {
    printf 'error: %s\n' "$1" >&2
    exit "$CLSA_BAD_INPUT"
}

# Reads site.env and refuses what is missing or misspelt in it. $1: name of the run, the default of its folder.
clsa_settings() {
    local name complaint env="${CLSA_ENV:-$CLSA_ROOT/slurm/site.env}"
    [ -f "$env" ] || clsa_refuse "$env is missing: copy slurm/site.env.example there and edit it"
    complaint="$(bash -n "$env" 2>&1 | head -n 1)"
    [ -z "$complaint" ] || clsa_refuse "CLSA_ENV is not valid shell: $complaint"
    for name in $(grep -oE '^ *(export +)?CLSA_\w+' "$env" | grep -oE 'CLSA_\w+'); do
        [[ $CLSA_SETTINGS == *" $name "* ]] || clsa_refuse "$env sets $name, which nothing reads:$CLSA_SETTINGS"
    done
    clsa_source "$env"
    [ -n "${CLSA_RUNS:-}${CLSA_OUT:-}" ] || clsa_refuse "$env: set CLSA_RUNS, a folder that all nodes see"
    : "${CLSA_OUT:=$CLSA_RUNS/$1}" "${CLSA_MAX_RESTARTS:=3}" "${CLSA_MIN_FREE_GB:=500}" "${CLSA_REQUEUE:=1}"
    : "${CLSA_GPUS_PER_NODE:=${SLURM_NTASKS_PER_NODE:-8}}" "${CLSA_PYTHON:=$CLSA_ROOT/.venv/bin/python}"
    for name in CLSA_MAX_RESTARTS CLSA_MIN_FREE_GB CLSA_GPUS_PER_NODE; do
        [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || clsa_refuse "$name=${!name}: give a whole number"
    done
    [[ $CLSA_REQUEUE =~ ^[01]$ ]] || clsa_refuse "CLSA_REQUEUE=$CLSA_REQUEUE: give 1 or 0"
    [[ ${CLSA_CONTAINER:-} != /* || -e $CLSA_CONTAINER ]] \
        || clsa_refuse "CLSA_CONTAINER=$CLSA_CONTAINER does not exist"
    CLSA_START=("$CLSA_PYTHON") # a path, which may hold spaces, or a command with its arguments
    command -v "$CLSA_PYTHON" >/dev/null || read -r -a CLSA_START <<<"$CLSA_PYTHON"
    [ -n "${CLSA_CONTAINER:-}" ] || command -v "${CLSA_START[0]}" >/dev/null \
        || clsa_refuse "CLSA_PYTHON=$CLSA_PYTHON does not exist: run tools/environment.sh once, or set it"
    mkdir -p "$CLSA_OUT/logs" 2>/dev/null \
        || clsa_refuse "CLSA_OUT=$CLSA_OUT cannot be made: give a folder that you may write to"
    # A folder a start: what an earlier start said is no reason for how this one ends.
    CLSA_LOGS="$CLSA_OUT/logs/${SLURM_JOB_ID:?submit this script with sbatch}/${SLURM_RESTART_COUNT:-0}"
    mkdir -p "$CLSA_LOGS" 2>/dev/null || clsa_refuse "$CLSA_LOGS cannot be made: is the disk full?"
}

# clsa_write FILE TEXT: fails where the text does not reach the disk, and then leaves the file as it was.
clsa_write() {
    printf '%s\n' "$2" >"$1.new" && sync "$1.new" && mv -fT "$1.new" "$1"
} 2>/dev/null

# Sources site.env and refuses it at the first command that fails: a path with spaces and no quotes is one.
clsa_source() {
    local said failed=''
    said="$(mktemp)"
    set +u -E # sites' own functions read variables that are not set; -E lets the trap into the file
    # The file's own status says nothing: a last line such as `[ -d X ] && Y` is no failure.
    trap '[[ $BASH_COMMAND == "source "* ]] || failed="${failed:-line $LINENO: $BASH_COMMAND}"' ERR
    # shellcheck disable=SC1090
    source "$1" 2>"$said"
    trap - ERR
    set -u +E
    if [ -n "$failed" ]; then
        clsa_refuse "$1, $failed: this command fails ($(tail -n 1 "$said")); quote values that hold spaces"
    fi
    cat "$said" >&2
    rm -f "$said"
}

# Where the ranks meet. The port is the job's own, so that two jobs on a node do not meet each other.
clsa_rendezvous() {
    : "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
    : "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
    export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
}

# Without --cpus-per-task all ranks share all CPUs of their node: `srun -c 1` would pin each to a core, and so
# do sites that bind by default. No share is computed: Slurm refuses it where a hint turns hyperthreads off, or
# on another kind of node, and deals it out across sockets, away from the rank's GPU.
clsa_cpus() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer inherits it since Slurm 22.05
    else
        export SLURM_CPU_BIND="${SLURM_CPU_BIND:-none}"
    fi
}

# clsa_container WORD...: srun's flags for a command of these words.
clsa_container() {
    [ -n "${CLSA_CONTAINER:-}" ] || return 0 # without pyxis srun does not know these flags
    local mounts="${CLSA_MOUNTS:-$(clsa_folders "$CLSA_ROOT" "$CLSA_OUT" "$@" | sort -u | paste -s -d ,)}"
    printf '%s\n' "--container-image=$CLSA_CONTAINER" "--container-mounts=$mounts"
    printf '%s\n' --no-container-mount-home --container-workdir="$CLSA_ROOT"
}

# The folders of the absolute paths among words: that of a file, a prefix of data, or a folder yet to be made.
# One that is not there is left out: pyxis would fail without a word of it, the check of nodes names it.
clsa_folders() {
    local word
    for word in "${@#--*=}"; do
        [[ $word != /* || -d $word ]] || word="$(dirname "$word")"
        [[ $word != /?* || ! -d $word ]] || printf '%s\n' "$word"
    done
}

# One look at every node. A job that restarts on fewer nodes would otherwise wait in the rendezvous for ever.
clsa_check_nodes() {
    local report status=0 answered
    report="$CLSA_LOGS/nodes.txt"
    clsa_write "$report" "on $SLURM_JOB_NODELIST" \
        || clsa_refuse "$report cannot be written: is the disk full?" # not: 0 nodes answer
    timeout 120 srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${container[@]}" "${CLSA_START[@]}" \
        "$CLSA_ROOT/slurm/check_node.py" --out "$CLSA_OUT" --gpus "$CLSA_GPUS_PER_NODE" \
        --free-gb "$CLSA_MIN_FREE_GB" "$@" >>"$report" 2>"$report.err" || status=$?
    if grep -q '^error: ' "$report"; then
        clsa_refuse "$(grep -h '^error: ' "$report" | sort -u | head -n 1 | cut -d ' ' -f 2-)"
    fi
    if grep -q 'unrecognized option.*container' "$report.err"; then
        clsa_refuse "CLSA_CONTAINER is set and srun knows no containers: install pyxis, or set CLSA_PYTHON"
    fi
    answered="$(grep -c '^node ' "$report" || true)"
    if [ "$answered" != "$SLURM_NNODES" ]; then
        clsa_say "only $answered of $SLURM_NNODES nodes answer (srun: $status, $(tail -n 1 "$report.err"))"
        clsa_again 1
    fi
    if [ "$(grep '^node ' "$report" | cut -d ' ' -f 3- | sort -u | wc -l)" != 1 ]; then
        clsa_refuse "nodes differ in what they run: $(grep '^node ' "$report" | sort -u -k 3 | paste -s -d '|')"
    fi
}

# Newest complete checkpoint of the run: progress is what survives.
clsa_progress() {
    find "$CLSA_OUT/checkpoints" -mindepth 3 -maxdepth 3 -name manifest.json 2>/dev/null | sort | tail -n 1
}

# clsa_again CODE: run the job once more, unless the user or the cluster ended it or nothing moves any more.
clsa_again() {
    local state count=0 before='' job='' now budget="$CLSA_OUT/logs/restarts"
    state="$(scontrol -o show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')"
    if [ "$state" != JobState=RUNNING ]; then # after scancel it is COMPLETING: a requeue would bring it back
        clsa_say "not run again: $state, the user or the cluster ended the job"
        exit "$1"
    fi
    now="$(clsa_progress)"
    [ -f "$budget" ] && IFS=$'\t' read -r job count before <"$budget"
    if [ "$job" = "$SLURM_JOB_ID" ] && [ "$before" = "$now" ]; then count=$((count + 1)); else count=1; fi
    if ! clsa_write "$budget" "$SLURM_JOB_ID"$'\t'"$count"$'\t'"$now"; then # it would be run again for ever
        clsa_say "not run again: $budget cannot be written, is the disk full?"
        exit "$1"
    fi
    if ((count > CLSA_MAX_RESTARTS)); then
        clsa_say "not run again: $CLSA_MAX_RESTARTS restarts without a new checkpoint"
        exit "$1"
    fi
    [ "$CLSA_REQUEUE" = 1 ] || { clsa_say "not run again: CLSA_REQUEUE=$CLSA_REQUEUE" && exit "$1"; }
    clsa_say "requeue after code $1, newest checkpoint: ${now:-none}"
    trap : TERM # ends the `wait`; if it were ignored, Slurm would wait its KillWait, 30 s or more, for this shell
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        clsa_say "not run again: Slurm refuses; set CLSA_REQUEUE=0 and submit a chain (slurm/chain.sh)"
        exit "$1"
    fi
    sleep 600 &
    wait
    exit "$1"
}

# clsa_train SCRIPT ARGUMENT...: one rank a task, on all nodes, until it ends.
# One srun task a rank, no torchrun: torchrun turns the codes 2 and 75 into 1, dies of USR1, and kills ranks
# 30 s after a TERM, in the middle of their last save.
clsa_train() {
    local status=0 step='' asked='' told
    local -a container=() data=()
    # An array's tasks would share one folder, and `scontrol requeue` of its number means all of them.
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || clsa_refuse "--array: a run is one job, submit one a run with its CLSA_OUT"
    clsa_rendezvous
    clsa_cpus
    # shellcheck disable=SC2206
    [ -n "${CLSA_DATA:-}" ] && data+=(--data-path $CLSA_DATA)
    [ -n "${CLSA_TOKENIZER:-}" ] && data+=(--tokenizer-model "$CLSA_TOKENIZER")
    mapfile -t container < <(clsa_container "$@" "${data[@]}")
    # bash runs a trap only while it waits, hence `srun &` and `wait`.
    trap 'asked=1; clsa_say "USR1: time limit near, asking the ranks to save"; ${step:+kill -USR1 $step}' USR1
    trap 'asked=1; clsa_say "TERM: Slurm tells the ranks itself, waiting for their save"' TERM
    clsa_check_nodes "${data[@]}"
    [ -z "$asked" ] || clsa_again "$CLSA_SAVED"
    clsa_say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST meet at $MASTER_ADDR:$MASTER_PORT, logs in $CLSA_LOGS"
    told="$CLSA_LOGS/srun.txt"
    # --wait: when a rank is gone, the others get a minute to finish a save before they are ended.
    # shellcheck disable=SC2016
    srun --label --wait=60 --kill-on-bad-exit=0 --open-mode=append --output="$CLSA_LOGS/%N.log" "${container[@]}" \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank \
        "${CLSA_START[@]}" "$@" --out "$CLSA_OUT" "${data[@]}" 2>>"$told" &
    step=$!
    until
        wait "$step"
        status=$?
        ! kill -0 "$step" 2>/dev/null
    do :; done
    # srun answers the highest code: 137 of ranks that waited for one that ended with 2, and were ended.
    if [ "$status" != "$CLSA_DONE" ] && [ "$status" != "$CLSA_SAVED" ]; then
        ! grep -qs 'Exited with exit code 2$' "$told" || status=$CLSA_BAD_INPUT
    fi
    case $status in
        "$CLSA_DONE") clsa_say "finished" && exit 0 ;;
        "$CLSA_BAD_INPUT") clsa_refuse "$(clsa_said '^ *[0-9]+: error: ')" ;;
        "$CLSA_SAVED") ;;
        *) clsa_say "the ranks ended with code $status: $(clsa_said); $(tail -n 1 "$told")" ;;
    esac
    clsa_again "$status"
}

# The last line of the logs that says why, rather one like $1: of ranks that refuse, not of those that they
# leave behind. Where all ranks refused, rank 0's, which does not name its rank. That Slurm ended a rank is no
# reason.
clsa_said() {
    local lines line
    lines="$(cat "$CLSA_LOGS"/*.log 2>/dev/null | grep -E 'error: |Error: |HANG' \
        | grep -v 'slurmstepd.* CANCELLED ')"
    lines="$(grep -E "${1:-}" <<<"$lines" || cat <<<"$lines")"
    line="$({ grep -v 'error: rank [0-9]* on ' <<<"$lines" || cat <<<"$lines"; } | tail -n 1 | cut -c 1-300)"
    if [ -n "$line" ]; then printf '%s' "${line#*error: }"; else printf 'see %s' "$CLSA_LOGS"; fi
}
