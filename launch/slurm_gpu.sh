#!/usr/bin/env bash
# Submits a config to SLURM, on one or many nodes with NVIDIA GPUs. From the login node:
#
#   launch/slurm_gpu.sh [--nodes=N] [--gpus=N] [OPTIONS] -- --config=FILE --workdir=DIR [--config.FIELD=VALUE]...
#
#   --nodes=1            how many nodes
#   --gpus=8             GPUs on each; every GPU gets a process, as JAX expects under SLURM
#   --cpus=8             processor cores for each process
#   --time=1-00:00:00    limit; two minutes before it the run is told to save and exit: the same command continues it
#   --partition=NAME     where to queue; the cluster's own choice by default
#   --account=NAME       whom to charge; likewise
#   --name=uae_jax       of the job; its log is NAME-JOBID.log in this folder
#   --xla_flags=gpu      set of compiler flags (launch/xla_flags.sh); none switches them off
#   --dry_run            prints the command and runs nothing
#
# Needs `pip install '.[cuda]'` in the environment that is active here. The nodes see the same files, DIR too. Processes
# find each other by the variables that srun sets. When one dies, srun ends the others.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

nodes=1 gpus=8 cpus=8 time=1-00:00:00 partition='' account='' name=uae_jax
while [ $# -gt 0 ]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done
whole nodes gpus cpus
need time name
program "$@"

set_flags=$(flags gpu "${XLA_FLAGS-}")
job=(sbatch "--job-name=$name" "--output=$name-%j.log" "--nodes=$nodes" "--gpus-per-node=$gpus" "--time=$time")
job+=("--ntasks-per-node=$gpus" "--cpus-per-task=$cpus" --signal=TERM@120)
[ -z "$partition" ] || job+=("--partition=$partition")
[ -z "$account" ] || job+=("--account=$account")
# srun asks for the cores again: since SLURM 22.05 a step no longer takes them from the job.
step=(srun --kill-on-bad-exit=1 "--cpus-per-task=$cpus" python -m uae_jax.main "$@")
call "${job[@]}" "--wrap=export $(quoted "XLA_FLAGS=$set_flags"); exec $(quoted "${step[@]}")"
