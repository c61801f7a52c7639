#!/usr/bin/env bash
# Runs a config on a TPU VM, from your own machine. Needs gcloud, and this repository installed there:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --command="pip install 'uae_jax[tpu] @ git+URL'"
# Usage: launch/tpu_vm.sh NAME ZONE --config=configs/tiny.py --workdir=DIR [--config.FIELD=VALUE]
set -euo pipefail
name=${1:?name of the TPU VM} zone=${2:?its zone}
shift 2
printf -v arguments '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="python3 -m uae_jax.main $arguments"
