#!/usr/bin/env bash
# A TPU VM pod slice, or several, by queued resource. From your own machine, with gcloud:
#
#   launch/tpu_vm.sh create   --name=NAME --zone=ZONE --type=TYPE [--slices=N] [--spot] [--runtime=VERSION]
#   launch/tpu_vm.sh describe --name=NAME --zone=ZONE
#   launch/tpu_vm.sh setup    --name=NAME --zone=ZONE
#   launch/tpu_vm.sh run      --name=NAME --zone=ZONE [--xla_flags=SET] -- --config=FILE --workdir=DIR [...]
#   launch/tpu_vm.sh logs     --name=NAME --zone=ZONE
#   launch/tpu_vm.sh stop     --name=NAME --zone=ZONE
#   launch/tpu_vm.sh delete   --name=NAME --zone=ZONE
#
# create    queues for TYPE (v5litepod-16, v5p-64, v6e-256, ...), --slices of them; --spot ones are cheaper, and may be
#           taken away. The software version follows from the type unless --runtime names it.
# describe  tells how far the request has come; go on when its state is ACTIVE.
# setup     copies the commit that is checked out here to uae_jax/ on every host, and installs it there (uae_jax/.venv).
# run       starts the program on every host, where it goes on without this machine. DIR, and what the config reads, is
#           a path that all hosts share (Filestore, or a bucket mounted by gcsfuse). After a break the same command
#           continues.
# logs      follows what the first host prints (uae_jax/run.log; every host has its own).
# stop      asks the run to save and to exit.
# delete    gives machines and request back, after gcloud has asked.
#
# Each takes --project=PROJECT (gcloud's own by default) and --dry_run, which prints the commands and runs nothing.
# Flags: launch/xla_flags.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' zone='' project='' type='' slices=1 spot=no runtime=''
case ${1-} in
  create | describe | setup | run | logs | stop | delete) verb=$1 ;;
  --help | -h) usage && exit ;;
  *) fail "'${1-}' is no command: use create, describe, setup, run, logs, stop or delete" ;;
esac
shift
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=yes ;;
    --runtime=*) runtime=${1#*=} ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done
need name zone
whole slices

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
tpus() { call gcloud compute tpus queued-resources "$@" "${where[@]}"; }

case $verb in
  create)
    need type
    case $runtime$type in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
    esac
    [ -n "$runtime" ] || fail "--runtime=... is missing: the software version for --type=$type"
    request=("--accelerator-type=$type" "--runtime-version=$runtime")
    if [ "$slices" = 1 ]; then
      request+=("--node-id=$name")
    else
      request+=("--node-count=$slices" "--node-prefix=$name")
    fi
    [ $spot = no ] || request+=(--spot)
    tpus create "$name" "${request[@]}"
    ;;
  describe) tpus describe "$name" ;;
  setup)
    archive=${TMPDIR:-/tmp}/uae_jax-$name.tar.gz
    call git -C "$(dirname "$0")/.." archive --format=tar.gz "--output=$archive" HEAD
    tpus scp "$archive" "$name:uae_jax.tar.gz" --node=all --worker=all
    # uv brings a Python of its own: those of the TPU images are too old.
    install="mkdir -p uae_jax && tar -xzf uae_jax.tar.gz -C uae_jax && cd uae_jax"
    install="$install && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv"
    install="$install && python3 -m uv venv --quiet --allow-existing --python=3.12 .venv"
    install="$install && python3 -m uv pip install --quiet --python=.venv/bin/python --editable '.[tpu]'"
    tpus ssh "$name" --node=all --worker=all "--command=$install"
    ;;
  run)
    program "$@"
    set_flags=$(flags tpu "${LIBTPU_INIT_ARGS-}")
    command=(env "LIBTPU_INIT_ARGS=$set_flags" .venv/bin/python -m uae_jax.main "$@")
    # In the background: gcloud reaches 64 hosts at a time, and these would wait for the others before it goes on.
    start="cd uae_jax && { nohup $(quoted "${command[@]}") >>run.log 2>&1 </dev/null & }"
    tpus ssh "$name" --node=all --worker=all "--command=$start"
    ;;
  logs) tpus ssh "$name" --node=0 --worker=0 "--command=tail -n 100 -F uae_jax/run.log" ;;
  stop)
    # The brackets keep the pattern from matching the shell that runs it.
    tpus ssh "$name" --node=all --worker=all "--command=pkill -TERM -f '[u]ae_jax.main' || echo nothing runs here"
    ;;
  delete) tpus delete "$name" --force ;;
esac
