#!/usr/bin/env bash
# qsub docs/launch/pbs.sh: two nodes of 8 GPUs, one MPI process a GPU. MPI only starts the processes; they find the
# first node in PBS_NODEFILE and their port from the job's number.
#PBS -N synco
#PBS -l select=2:ncpus=64:ngpus=8:mpiprocs=8
#PBS -l walltime=24:00:00
set -euo pipefail
cd "$PBS_O_WORKDIR"
DATA=${DATA:?folder of images, the same on every node}

mpirun python main_pretrain.py --config configs/synco_in1k_200ep.yml --lr 0.06 -j 64 --save-dir runs/synco --keep 3 \
    --max-minutes 1435 --resume auto "$DATA"
