#!/usr/bin/env bash
# Mistral NeMo from texts, on many machines: what to run, in order.
#
#     recipes/nemo-12b.sh --dry-run       checks recipes, shapes and memory here, and starts nothing
#     recipes/nemo-12b.sh                 runs on this machine's share (under torchrun's variables)
set -euo pipefail
here=$(dirname "$0") dry=${1:-}
opennemo=${OPENNEMO:-opennemo}
for recipe in nemo-12b nemo-12b-long; do
    "$opennemo" plan "$here/$recipe.toml" --gpus "${GPUS:-8xH100}" --nodes "${NODES:-384}" \
        --shape mistral-nemo-12b
    [ "$dry" = --dry-run ] && continue
    torchrun --nnodes "${NODES:?}" --nproc-per-node "${GPUS_A_NODE:-8}" --max-restarts 100 \
        --rdzv-backend c10d --rdzv-endpoint "${HEAD:?host:port of the first machine}" \
        -m opennemo train "$here/$recipe.toml" --out "runs/$recipe"
done
