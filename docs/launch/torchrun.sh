#!/usr/bin/env bash
# Two nodes of 8 GPUs; run this on each of them with the same HOST, the first node's address.
# A node whose worker dies restarts it with the others, at most three times, from the newest checkpoint. A run that
# --max-minutes or SIGUSR1 stops ends with 0 under torchrun; this file then ends with 75: it wants to be started again.
set -euo pipefail
HOST=${HOST:?address of the first node} DATA=${DATA:?folder of images, the same on every node}
# torch 2.14's agents keep one store for all restarts, in which new processes find the dead ones' addresses and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HOST:29400" --rdzv-id synco \
    --max-restarts 3 \
    main_pretrain.py --config configs/synco_in1k_200ep.yml --lr 0.06 --save-dir runs/synco --keep 3 --resume auto "$DATA"

tail -n 1 runs/synco/log_events.jsonl | grep -q '"reason": "finished"' || exit 75
