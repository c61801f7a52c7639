#!/usr/bin/env bash
# TPU slices on Google Kubernetes Engine, through xpk (pip install xpk), on a cluster made by `xpk cluster create`:
#
#   launch/gke_xpk.sh image    --image=IMAGE
#   launch/gke_xpk.sh run      WHERE --name=NAME --type=TYPE --image=IMAGE [--slices=N] [--restarts=N]
#                              [--xla_flags=SET] -- --config=FILE --workdir=DIR [--config.FIELD=VALUE]...
#   launch/gke_xpk.sh describe WHERE --name=NAME
#   launch/gke_xpk.sh delete   WHERE --name=NAME
#
# WHERE is --cluster=NAME --zone=ZONE --project=PROJECT.
#
# image     builds the commit that is checked out here as a container (launch/Dockerfile) and pushes it to IMAGE, for
#           example REGION-docker.pkg.dev/PROJECT/REPOSITORY/uae_jax:latest.
# run       starts it on every host of --slices slices of TYPE (v5litepod-16, v5p-64, v6e-256, ...). DIR, and what the
#           config reads, lies on storage that all hosts mount (`xpk storage`). A job that fails is started again up to
#           --restarts times, and continues.
# describe  lists the job and its state.
# delete    ends it.
#
# Each takes --dry_run, which prints the commands and runs nothing. Flags: launch/xla_flags.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

cluster='' zone='' project='' name='' type='' image='' slices=1 restarts=''
case ${1-} in
  image | run | describe | delete) verb=$1 ;;
  --help | -h) usage && exit ;;
  *) fail "'${1-}' is no command: use image, run, describe or delete" ;;
esac
shift
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} && whole restarts ;;
    --help | -h) usage && exit ;;
    --) shift && break ;;
    *) common_option "$1" ;;
  esac
  shift
done

if [ "$verb" = image ]; then
  need image
  archive=${TMPDIR:-/tmp}/uae_jax-image.tar
  call git -C "$(dirname "$0")/.." archive --format=tar "--output=$archive" HEAD
  call bash -c "$(quoted docker build --file=launch/Dockerfile "--tag=$image" -) < $(quoted "$archive")"
  call docker push "$image"
  exit
fi

need cluster zone project name
workload() { call xpk workload "$@" "--cluster=$cluster" "--zone=$zone" "--project=$project"; }

case $verb in
  run)
    need type image
    whole slices
    program "$@"
    set_flags=$(flags tpu "${LIBTPU_INIT_ARGS-}")
    # exec: a request to stop reaches the program, not a shell round it. It has five minutes to save.
    job=("--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image")
    job+=("--env=LIBTPU_INIT_ARGS=$set_flags" --termination-grace-period-seconds=300)
    [ -z "$restarts" ] || job+=("--max-restarts=$restarts")
    workload create "${job[@]}" "--command=exec $(quoted python -m uae_jax.main "$@")"
    ;;
  describe) workload list "--filter-by-job=$name" ;;
  delete) workload delete "--workload=$name" ;;
esac
