#!/bin/bash
# Everything that only a GPU can show, in at most nine minutes, into one page: OUT/gpu.md (docs/gpu.md when it is kept).
#
#   OUT=/tmp/tsfm_gpu bash benchmarks/gpu/run_all.sh          on a machine with a GPU
#   bash benchmarks/gpu/run_all.sh --tiny                     the same code with tiny sizes, on any machine
#
# Each part has its own limit and leaves its rows as it goes, so that a part that hangs costs the others nothing.
# Nothing is written outside OUT and /tmp. BUDGET is the number of seconds for all parts together.
set -u
cd "$(dirname "$0")/../.."
export OUT=${OUT:-/tmp/tsfm_gpu} PYTHONUTF8=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore
export PYTHONPATH=$PWD/custom:$PWD/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TORCHINDUCTOR_CACHE_DIR=/tmp/tsfm_inductor
[ "${1:-}" = --tiny ] && export TSFM_GPU_TINY=1 OMP_NUM_THREADS=1
PYTHON=${PYTHON:-python3}
END=$(($(date +%s) + ${BUDGET:-535}))
mkdir -p "$OUT"
rm -rf "$OUT"/rows.jsonl /tmp/tsfm_gpu_logs

left() { echo $((END - $(date +%s))); }

part() { # part LIMIT COMMAND...: not longer than LIMIT seconds, nor than what is left
    local limit=$1 have
    shift
    have=$(left)
    [ "$have" -lt "$limit" ] && limit=$have
    [ "$limit" -lt 5 ] && echo "no time left for: $*" && return
    timeout -k 3 "$limit" "$PYTHON" "benchmarks/gpu/$@" || echo "part ended with $?: $*"
    "$PYTHON" benchmarks/gpu/record.py "$OUT"
    tail -n 40 -v /tmp/tsfm_gpu_logs/*.log > "$OUT/logs.txt" 2> /dev/null
}

# Right or wrong first, both at once: neither is timed. Then what is timed, alone, in the order of its worth.
part 150 runs.py small &
part 60 checks.py
wait
part 150 steps.py --seconds 110
part 75 window.py --seconds 55
part 50 loader.py
part 100 runs.py paper
part 70 steps.py --seconds 45 --rivals
part 150 steps.py --seconds 100 --compile
cat "$OUT/gpu.md"
