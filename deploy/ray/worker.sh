#!/usr/bin/env bash
# A node that joins: ./worker.sh HEAD [options of ray start]
set -euo pipefail
cd "$(dirname "$0")/.."
. "${MEDSWAV_VALUES:-values.env}"
head=${1:?give the name of the head node}
shift
. ray/environment.sh
exec ray start --address="$head:$RAY_PORT" --block --disable-usage-stats "$@"
