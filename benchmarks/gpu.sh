#!/usr/bin/env bash
# Every figure that needs a GPU, in under nine minutes: bash benchmarks/gpu.sh DATA [OUT]
# DATA: a folder in VOC layout with lists train and val (VOCdevkit/VOC2007). OUT: where tables, JSON and plots go.
# A part that fails or takes too long is told and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
data=${1:?name a folder in VOC layout}
out=${2:-gpu-results}
python=${PYTHON:-python3}
workers=$(nproc)
mkdir -p "$out"
began=$SECONDS

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" > >(tee "$out/$name.txt") 2> >(tee "$out/$name.err" >&2) || echo "== $name FAILED ($?), see $out/$name.err"
    echo "== $((SECONDS - began)) s so far"
}

speed() { # speed NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "benchmarks/$name.py" --data "$data" --device cuda --json "$out/$name.json" "$@"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/machine.txt"
speed training_step 120 --batch-size 32 --compile --rounds 7
speed inference 50 --batch-sizes 1 32 --rounds 7
speed losses 30
speed loader 50 --workers "$workers" --images 2500 --rounds 2
speed end_to_end 90 --workers "$workers" --images 2500 --rounds 2 --batch-size 32 --compile
part train 200 "$python" ssd_object_detection.py --data "$data" --train-split train --val-fraction .05 --test-split val \
    --recipe scratch --epochs 40 --eval-interval 10 --workers "$workers" --device cuda --output-dir "$out/run"
echo "all done in $((SECONDS - began)) s"
