#!/usr/bin/env bash
# The table of Pascal VOC2007 test: bash benchmarks/voc.sh [OUT] [TRAINING FLAGS...]
# Trains VOC2007 trainval and VOC2007+2012 trainval, three seeds each, by the default recipe, by --recipe paper and by
# the default recipe from COCO weights (not comparable with the others: "COCO start"), and measures VOC2007 test.
# Data and weights are downloaded. Started again it goes on where it was stopped. The tables are OUT/voc2007.md and
# OUT/voc0712.md (.json beside them), OUT/runs has every run. TRAINING FLAGS are added to all runs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-voc-results}
flags="${*:2}"
python=${PYTHON:-python3}

epochs=$("$python" -c 'import ssd_object_detection as ssd; print(ssd.RECIPES["voc"]["epochs"])')
images=$((5011 + 16551)) # of both trainings
rate=2100                # images a second on an H100 by the default recipe, docs/speed.md
rest=120                 # seconds beside training, of both
minutes=$((9 * (images * epochs / rate + rest) / 60))
echo "18 trainings of $epochs epochs: about $((minutes / 60)) h $((minutes % 60)) min on an H100 ($rate images/s)"

for data in voc2007 voc0712; do
    "$python" benchmarks/recipes.py --data "$data" --set "$data" --only base paper "COCO start" --seeds 0 1 2 \
        "--flags=$flags" --folder "$out"
done
cat "$out"/voc2007.md "$out"/voc0712.md
