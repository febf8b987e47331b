#!/usr/bin/env bash
# sbatch docs/launch/slurm.sh: two nodes of 8 GPUs, one task a GPU. The run finds its peers in SLURM's variables.
# Two minutes before the time limit SLURM sends SIGUSR1: the run saves and ends with exit code 75, on which this file
# requeues its job, at most TRIES times; --resume auto goes on.
#SBATCH --job-name=synco --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@120 --requeue --open-mode=append --output=synco-%j.log
set -euo pipefail
DATA=${DATA:?folder of images, the same on every node} TRIES=${TRIES:-20}

code=0
srun python main_pretrain.py --config configs/synco_in1k_200ep.yml --lr 0.06 -j 64 --save-dir runs/synco --keep 3 \
    --resume auto "$DATA" || code=$?
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$TRIES" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
