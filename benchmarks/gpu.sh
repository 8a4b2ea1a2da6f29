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

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/machine.txt"
common=(--data "$data" --device cuda)
part training_step 120 "$python" benchmarks/training_step.py "${common[@]}" --batch-size 32 --compile --rounds 7 --json "$out/training_step.json"
part inference 50 "$python" benchmarks/inference.py "${common[@]}" --compile --rounds 7 --json "$out/inference.json"
part losses 30 "$python" benchmarks/losses.py "${common[@]}" --json "$out/losses.json"
part loader 50 "$python" benchmarks/loader.py "${common[@]}" --workers "$workers" --images 2500 --rounds 2 --json "$out/loader.json"
part end_to_end 90 "$python" benchmarks/end_to_end.py "${common[@]}" --images 2500 --batch-size 32 --workers "$workers" \
    --cache ram --compile --rounds 2 --json "$out/end_to_end.json"
part train 200 "$python" ssd_object_detection.py --data "$data" --train-split train --val-fraction .05 --test-split val \
    --no-pretrained --epochs 40 --batch-size 32 --eval-interval 10 --workers "$workers" --cache ram --profile 5 --output-dir "$out/run"
echo "all done in $((SECONDS - began)) s"
