#!/usr/bin/env bash
# The manifests with the values of ../values.env, or of the file that MEDSWAV_VALUES names:
#   ./render.sh base.yaml cluster.yaml | kubectl apply -f -
set -euo pipefail
cd "$(dirname "$0")"
values=${MEDSWAV_VALUES:-../values.env}
set -a
. "$values"
set +a
names=$(sed -n 's/^\([A-Z_]*\)=.*/${\1}/p' "$values")
for file in "$@"; do
    echo "---"
    envsubst "$names" < "$file"
done
