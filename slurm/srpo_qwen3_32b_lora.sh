#!/usr/bin/env bash
#SBATCH --job-name=srpo-qwen3-32b-lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:-.}/slurm/common.sh" examples/science/srpo_qwen3_32b_lora.toml "$@"
