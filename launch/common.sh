# shellcheck shell=bash
# What the launch scripts share: manual, errors, quoting, --dry_run. Sourced, never run; bash 3.2 (macOS) is enough.

dry_run=no
xla_flags=''

# Prints the comment at the top of the script, which is its manual.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# One line, exit code 2: something that the user can fix.
fail() {
  echo "error: $* (see $0 --help)" >&2
  exit 2
}

# Words on one line, quoted so that any POSIX shell reads the same words again.
quoted() {
  local word line='' single="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!a-zA-Z0-9_./:=,@%+-]*) word="'${word//\'/$single}'" ;;
    esac
    line="$line $word"
  done
  printf '%s' "${line# }"
}

# Runs a command; under --dry_run prints it.
call() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
    echo
  else
    command -v "$1" >/dev/null || fail "there is no $1 on this machine: install it first"
    "$@"
  fi
}

# common_option WORD: takes an option that every script has; anything else is no option.
common_option() {
  case $1 in
    --dry_run) dry_run=yes ;;
    --xla_flags=*) xla_flags=${1#*=} ;;
    *) fail "'$1' is no option; what is meant for the program comes after --" ;;
  esac
}

# need OPTION...: each has a value.
need() {
  local _option
  for _option in "$@"; do
    [ -n "${!_option}" ] || fail "--$_option=... is missing"
  done
}

# whole OPTION...: each is a whole number from 1.
whole() {
  local _option
  for _option in "$@"; do
    case ${!_option} in
      '' | 0* | *[!0-9]*) fail "--$_option=${!_option}: use a whole number from 1" ;;
    esac
  done
}

# program WORD...: what came after -- names a config, and is one line.
program() {
  local word config=no
  for word in "$@"; do
    case $word in
      *$'\n'*) fail "an argument holds a line break: $(quoted "${word%%$'\n'*}")..." ;;
      --config=?*) config=yes ;;
    esac
  done
  [ $config = yes ] || fail "no config: end with -- --config=FILE --workdir=DIR"
}

# flags PLATFORM YOURS: the platform's set, or the one of --xla_flags, and what you have set yourself behind it.
flags() {
  local set
  set=$("$(dirname "$0")/xla_flags.sh" "${xla_flags:-$1}") || exit
  set="$set $2"
  set=${set# }
  printf '%s' "${set% }"
}
