#!/usr/bin/env bash
# Runs a config on this machine's NVIDIA GPUs, all of them, as one process:
#
#   launch/gpu.sh [--xla_flags=gpu|none] [--dry_run] -- --config=FILE --workdir=DIR [--config.FIELD=VALUE]...
#
# Needs `pip install '.[cuda]'` in the environment of `python`. CUDA_VISIBLE_DEVICES chooses among the GPUs. --dry_run
# prints the command and runs nothing. Flags: launch/xla_flags.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done
program "$@"

set_flags=$(flags gpu "${XLA_FLAGS-}")
call env "XLA_FLAGS=$set_flags" python -m uae_jax.main "$@"
