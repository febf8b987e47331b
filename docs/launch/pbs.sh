#!/usr/bin/env bash
# qsub docs/launch/pbs.sh: two nodes of 8 GPUs, one MPI process a GPU. MPI only starts the processes; they find the
# first node in PBS_NODEFILE and their port from the job's number. Before the walltime is over the run saves and ends
# with exit code 75, on which this file submits itself again, at most TRIES times; --resume auto goes on.
#PBS -N synco
#PBS -l select=2:ncpus=64:ngpus=8:mpiprocs=8
#PBS -l walltime=24:00:00
set -euo pipefail
cd "$PBS_O_WORKDIR"
DATA=${DATA:?folder of images, the same on every node} TRIES=${TRIES:-20}

code=0
mpirun python main_pretrain.py --config configs/synco_in1k_200ep.yml --lr 0.06 -j 64 --save-dir runs/synco --keep 3 \
    --max-minutes 1430 --resume auto "$DATA" || code=$?
if [ "$code" -eq 75 ] && [ "$TRIES" -gt 0 ]; then
    qsub -v "DATA=$DATA,TRIES=$((TRIES - 1))" docs/launch/pbs.sh
fi
exit "$code"
