#!/usr/bin/env bash
# Sets of compiler flags by platform. Prints a set on one line:
#
#   launch/xla_flags.sh tpu|tpu_v5e|gpu|none
#
# JAX reads its flags when it starts, so they are put into the environment before it does: TPU ones in LIBTPU_INIT_ARGS
# (in XLA_FLAGS they end the program: only libtpu knows them), GPU ones in XLA_FLAGS. The other scripts of this folder
# do that, with what you have set in that variable behind them: what comes later wins. A version of XLA that does not
# know a flag ends the program at start-up and names it; take it out here, or launch with --xla_flags=none. A run prints
# its flags and keeps them in environment.json.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

tpu=(
  # FSDP gathers the weights of every layer: a gather runs while the layer before it is computed, ...
  --xla_enable_async_all_gather=true
  # ... beside the matrix products of the tensor core.
  --xla_tpu_overlap_compute_collective_tc=true
  # Between slices, gradients cross the data-centre network: reduce a layer's while the next one's are computed, ...
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  # ... also where layers differ in size.
  --xla_tpu_data_parallel_opt_different_sized_ops=true
)

tpu_v5e=(
  # What holds for all TPUs.
  "${tpu[@]}"
  # Gathers fused into the computation that hides them, not placed between its parts; libtpu 0.0.51 refuses to compile
  # these three for v5p and v6e.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
)

gpu=(
  # Orders the program so that collectives run under computation; without it they stand between the layers.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # Collectives get the stream that is served first: whoever waits for them waits less.
  --xla_gpu_enable_highest_priority_async_stream=true
  # NVLink and InfiniBand like large messages: gathers and scatters are joined up to 128 MiB, ...
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  # ... reductions, which nobody needs before the end of a step, up to 1 GiB.
  --xla_gpu_all_reduce_combine_threshold_bytes=1073741824
  # Layers are scanned: with two buffers, the gather for the next layer does not wait for a copy of this one's.
  --xla_gpu_enable_while_loop_double_buffering=true
)

case ${1-} in
  tpu) echo "${tpu[*]}" ;;
  tpu_v5e) echo "${tpu_v5e[*]}" ;;
  gpu) echo "${gpu[*]}" ;;
  none) echo ;;
  --help | -h) usage ;;
  *) fail "'${1-}' is no set of flags: use tpu, tpu_v5e, gpu or none" ;;
esac
