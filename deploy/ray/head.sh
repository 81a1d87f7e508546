#!/usr/bin/env bash
# The head of a cluster without Kubernetes or Slurm. It stays in the foreground (systemd, tmux); SIGTERM ends it.
set -euo pipefail
cd "$(dirname "$0")/.."
. "${MEDSWAV_VALUES:-values.env}"
# The token that every node and every user of the cluster needs; mode 0600, never in an argument.
if [ ! -e "$TOKEN_FILE" ]; then
    (umask 077; mkdir -p "$(dirname "$TOKEN_FILE")"; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$TOKEN_FILE")
fi
. ray/environment.sh
exec ray start --head --block --port="$RAY_PORT" --dashboard-port="$DASHBOARD_PORT" --disable-usage-stats "$@"
