#!/usr/bin/env bash
# Training on several nodes under SLURM:  sbatch examples/slurm.sh --model_name_or_path MODEL --train_data ROWS --output_dir runs/aspo
# What follows the script's name goes to `aspo train`. One launcher a node starts a process for each of its GPUs; which
# strategy (DDP, FSDP2, ZeRO-3) is the accelerate file's: CONFIG=configs/accelerate/fsdp2.yaml sbatch examples/slurm.sh ...
#SBATCH --job-name=aspo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# --requeue: a job that lost a node starts again, and `aspo train` goes on from the last complete checkpoint.
set -euo pipefail

export CONFIG=${CONFIG:-configs/accelerate/two_nodes.yaml}
export GPUS=${SLURM_GPUS_ON_NODE:-8}
export MASTER_PORT=${MASTER_PORT:-29500}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# In single quotes: SLURM_NODEID differs from node to node, and is known there only.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m aspo train "$@"
' aspo "$@"
