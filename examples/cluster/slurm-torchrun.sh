#!/bin/bash
# One training (M-step) on a Slurm allocation, without Ray: torchrun on every node, FSDP2 over all GPUs.
#   sbatch --nodes 4 examples/cluster/slurm-torchrun.sh mine.yaml /shared/runs/mine 1
# The third argument is the EM iteration, 0 for the warm start; the stages before it must have been run.
# Submit it again after it was stopped: it goes on from the last checkpoint, on any number of nodes.
#SBATCH --job-name latent-thoughts-train
#SBATCH --nodes 4
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --time 24:00:00
#SBATCH --requeue
set -euo pipefail
recipe=$1 run=$2 iteration=${3:-0}
source "${VENV:-.venv}/bin/activate"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# `hybrid` keeps a copy of the model on every node, so that only gradients travel between them.
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" --max-restarts 3 \
  -m latent_thoughts.cli train "$recipe" --out "$run" --iteration "$iteration" train.shard=hybrid
