# What every run.sh begins with: its folder becomes the project's root, and paths among the arguments stay the caller's.
caller=$(pwd -P)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

own_path() { # a path as the caller means it
  case $1 in
    /*) echo "$1" ;;
    *) echo "$caller/$1" ;;
  esac
}

if [ "$caller" != "$(pwd -P)" ]; then
  arguments=() previous=
  for argument in "$@"; do
    case $previous in
      --out | --data-dir | --checkpoint | --tensorboard | --figures) argument=$(own_path "$argument") ;;
      --data | --encoder) [ ! -e "$caller/$argument" ] || argument=$(own_path "$argument") ;; # else a name, and no file
    esac
    case $argument in
      --out=* | --data-dir=* | --checkpoint=* | --tensorboard=* | --figures=*) argument=${argument%%=*}=$(own_path "${argument#*=}") ;;
      --data=* | --encoder=*) [ ! -e "$caller/${argument#*=}" ] || argument=${argument%%=*}=$(own_path "${argument#*=}") ;;
    esac
    arguments+=("$argument")
    previous=$argument
  done
  set -- ${arguments[@]+"${arguments[@]}"}
fi
