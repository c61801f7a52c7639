#!/usr/bin/env bash
# One node with NVIDIA GPUs under SLURM: sbatch launch/slurm_gpu.sh --config=configs/tiny.py --workdir=DIR
# The environment needs `pip install '.[cuda]'`.
#SBATCH --job-name=uae_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
# SLURM's warning before the time limit: the run saves and exits; the same command continues it.
#SBATCH --signal=TERM@120
set -euo pipefail
exec srun python -m uae_jax.main "$@"
