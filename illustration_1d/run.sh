#!/usr/bin/env bash
# Both figures of the one-dimensional illustration. Further arguments are passed on.
#   bash illustration_1d/run.sh
#   bash illustration_1d/run.sh --print     print the command, and run nothing
set -euo pipefail
source "$(dirname "$0")/../resources/caller.sh"

commands() {
  command_line illustration_1d.train "$@"
}

source resources/run_commands.sh
