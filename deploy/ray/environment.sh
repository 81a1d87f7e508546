# Of every node, before `ray start` (docs/operations.md, environment of the nodes).
export RAY_USAGE_STATS_ENABLED=0
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN_FILE"
# A machine that loses power closes no connection.
export RAY_grpc_client_keepalive_time_ms=10000 RAY_grpc_client_keepalive_timeout_ms=10000
# Where jobs tell Prometheus of themselves.
export MEDSWAV_METRICS_TARGETS="$SHARED/targets"
