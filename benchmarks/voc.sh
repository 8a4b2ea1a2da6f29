#!/usr/bin/env bash
# The table of Pascal VOC2007 test: bash benchmarks/voc.sh [OUT] [TRAINING FLAGS...]
# Trains VOC2007 trainval and VOC2007+2012 trainval, three seeds each, by the default recipe and by --recipe paper,
# and measures VOC2007 test. Started again it goes on where it was stopped. The tables are OUT/voc2007.md and
# OUT/voc0712.md (.json beside them), OUT/runs has every run. TRAINING FLAGS are added to all runs.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-voc-results}
flags="${*:2}"
for data in voc2007 voc0712; do
    "${PYTHON:-python3}" benchmarks/recipes.py --data "$data" --set "$data" --only base paper --seeds 0 1 2 --pool \
        "--flags=$flags" --folder "$out"
done
cat "$out"/voc2007.md "$out"/voc0712.md
