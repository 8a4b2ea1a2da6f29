#!/bin/bash
# Train on several machines under Slurm: sbatch examples/slurm.sh --data PATH --batch-size 512 ...
# Not run on a cluster; its syntax was checked by bash -n and shellcheck.
#
# The folder of this checkout and its virtual environment (.venv) are on a disk that all machines see; so is
# OUTPUT, which the first machine alone reads and writes. The data may be copies on local disks.
#SBATCH --job-name=ssd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=104
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

output=${OUTPUT:-runs/ssd}
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# After a requeue the run goes on from its last saved epoch.
flags=("$@")
if [[ -f $output/checkpoints/last.pth ]]; then
    flags=(--resume)
fi

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${machines[0]}:29500" \
    ssd_object_detection.py --output-dir "$output" "${flags[@]}"
