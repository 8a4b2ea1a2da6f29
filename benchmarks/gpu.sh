#!/usr/bin/env bash
# What needs a GPU, in under a quarter of an hour: bash benchmarks/gpu.sh DATA [OUT] [TRAINING FLAGS...]
# DATA: a folder in VOC layout with lists train and val (VOCdevkit/VOC2007). OUT: where tables, JSON and plots go.
# TRAINING FLAGS: of the run, else --recipe scratch, which needs no weights. What matters most comes first; a part
# that fails or takes too long is told and does not stop the others, and what it had measured is in OUT/NAME.err.
set -uo pipefail
cd "$(dirname "$0")/.."
data=${1:?name a folder in VOC layout}
out=${2:-gpu-results}
flags=("${@:3}")
python=${PYTHON:-python3}
workers=$(nproc)
mkdir -p "$out"
began=$SECONDS

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    timeout --kill-after 10 "$limit" "$@" > >(tee "$out/$name.txt") 2> >(tee "$out/$name.err" >&2) ||
        echo "== $name FAILED ($?), see $out/$name.err"
    echo "== $((SECONDS - began)) s so far"
}

speed() { # speed NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "benchmarks/$name.py" --data "$data" --device cuda --json "$out/$name.json" "$@"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/machine.txt"
part tests 90 "$python" -m pytest tests/test_13_gpu.py
speed training_step 150 --batch-size 32 --compile --rounds 5
part train 200 "$python" ssd_object_detection.py --data "$data" --train-split train --val-fraction .05 --test-split val \
    --epochs 30 --eval-interval 10 --device cuda --output-dir "$out/run" "${flags[@]:---recipe=scratch}"
speed end_to_end 180 --workers "$workers" --images 2500 --rounds 2 --batch-size 32 --compile
speed inference 100 --batch-sizes 1 32 --rounds 5
speed loader 80 --workers "$workers" --images 2500 --rounds 2
speed losses 40
echo "all done in $((SECONDS - began)) s"
