#!/usr/bin/env bash
# The whole comparison: set up, measure in interleaved rounds, print the tables.
#   bash bench.sh quick   about 15 minutes: one round, short, 1 and 64 connections
#   bash bench.sh full    about two hours: three rounds, every workload, 1, 8 and 64 connections
# FAIRLEAD_PYTHON: the environment that Fairlead itself runs in (default: the project's .venv).
set -euo pipefail
cd "$(dirname "$0")"
mode=${1:-quick}
case $mode in
  quick) rounds=1 seconds=2 connections="1 64" ;;
  full) rounds=3 seconds=4 connections="1 8 64" ;;
  *) echo "usage: bench.sh [quick|full]" >&2; exit 2 ;;
esac
bash setup.sh
export UV=${UV-$(command -v uv || ls ../../.venv/bin/uv 2>/dev/null || true)}
python=$PWD/envs/base/bin/python
out=results/$mode.jsonl
mkdir -p results
rm -f "$out"
sweep() { $python sweep.py "$out" --rounds $rounds --seconds $seconds --connections $connections "$@"; }

if [ "$mode" = full ]; then
  sweep
else
  sweep --workloads w1 w3
  sweep --workloads w2 w4 --peers fairlead:bin triton:bin
fi
sweep --workloads w1 w3 --paced
$python footprint.py >> "$out"
$python table.py "$out" | tee "results/$mode.md"
