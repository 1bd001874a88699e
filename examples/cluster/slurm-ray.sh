#!/bin/bash
# A whole EM run on a Slurm allocation: Ray over all nodes, one engine a GPU, training on all GPUs.
#   sbatch --nodes 4 examples/cluster/slurm-ray.sh mine.yaml /shared/runs/mine
# Submit it again after it was stopped: it goes on. RUN must be on storage that every node sees.
#SBATCH --job-name latent-thoughts
#SBATCH --nodes 4
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --time 24:00:00
#SBATCH --requeue
set -euo pipefail
recipe=$1 run=$2
source "${VENV:-.venv}/bin/activate" # with: pip install -e '.[ray]'

# Others on these machines can neither join this Ray nor have it run code (Ray 2.52 and later).
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
address=$(srun --overlap --nodes 1 --ntasks 1 -w "$head" hostname --ip-address | awk '{print $1}')
port=${RAY_PORT:-6379}
gpus=$SLURM_GPUS_ON_NODE
total=$((gpus * SLURM_JOB_NUM_NODES))

# --block keeps a node's Ray in the foreground of its step, which ends with the job.
srun --overlap --nodes 1 --ntasks 1 -w "$head" ray start --head --block --disable-usage-stats \
  --node-ip-address "$address" --port "$port" --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" &
timeout 300 bash -c "until ray health-check --address $address:$port 2> /dev/null; do sleep 2; done"
if ((SLURM_JOB_NUM_NODES > 1)); then
  srun --overlap --nodes $((SLURM_JOB_NUM_NODES - 1)) --ntasks $((SLURM_JOB_NUM_NODES - 1)) --exclude "$head" \
    ray start --block --disable-usage-stats --address "$address:$port" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" &
fi

# The driver runs on the head node. GPUs serve generation and training in turn.
latent-thoughts em "$recipe" --out "$run" --yes \
  executor.kind=ray executor.address="$address:$port" \
  executor.workers="$total" executor.train_workers="$total" executor.gpus=1 executor.cpus=4
