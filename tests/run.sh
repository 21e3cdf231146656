#!/usr/bin/env bash
# Runs the tests in the checkout's own environment: bash tests/run.sh [pytest arguments].
# Makes .venv first if it is missing (tools/environment.sh). Paths in the arguments are relative to the checkout.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/tools/environment.sh"
clsa_environment
cd "$root"
exec python -m pytest --no-loadscope-reorder "$@"
