#!/usr/bin/env bash
# A Ray head on this machine, for `ray job submit` and a service that outlives its job.
#
#   cluster/local.sh start     start it, wait until it takes jobs; nothing happens if it runs already
#   cluster/local.sh status    where it is, and what Ray says about it; exit 1 if it does not run
#   cluster/local.sh stop      end this head, its jobs and its service, and nothing else on the machine
#
# What may be set (environment): PYTHON (python3), KGRAY_RAY_DIR (/tmp/kgray-ray-UID; short, sockets lie in it),
# KGRAY_RAY_CPUS, KGRAY_RAY_OBJECT_STORE (bytes), and the ports KGRAY_RAY_PORT (6379), KGRAY_DASHBOARD_PORT (8265),
# KGRAY_AGENT_PORT (52365), KGRAY_CLIENT_PORT (10001), KGRAY_METRICS_PORT (8090). Two heads on one machine need
# different folders and different ports. Ray's workers take 10002-19999: no port of ours may lie there.
set -euo pipefail

PYTHON=${PYTHON:-python3}
DIR=${KGRAY_RAY_DIR:-/tmp/kgray-ray-$(id -u)}
PORT=${KGRAY_RAY_PORT:-6379}
DASHBOARD_PORT=${KGRAY_DASHBOARD_PORT:-8265}
AGENT_PORT=${KGRAY_AGENT_PORT:-52365}
CLIENT_PORT=${KGRAY_CLIENT_PORT:-10001}
METRICS_PORT=${KGRAY_METRICS_PORT:-8090}
PID_FILE=$DIR/head.pid
LOG=$DIR/head.log

# Everything listens on the loopback only, so no token is asked for: `ray job submit` works as it stands in the
# README. A head that other machines can reach must not be started this way.
export RAY_AUTH_MODE=disabled
# Workers take these from the head; kgray/runtime.py gives its reasons and sets the same ones for a Ray of its own.
export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_PRINT_PATCH=0 RAY_CHDIR_TO_TRIAL_DIR=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_DATA_PARQUET_FOOTER_NUM_ACTORS=1

ray() { "$PYTHON" -m ray.scripts.scripts "$@"; }

die() {
    echo "cluster/local.sh: $*" >&2
    exit 1
}

# The pid of our head, or nothing. A pid may have been given to another program since: its command must be ours.
head_pid() {
    local pid
    pid=$(cat "$PID_FILE" 2>/dev/null) || return 0
    if ps -o args= -p "$pid" 2>/dev/null | grep -qF -- "--temp-dir=$DIR"; then echo "$pid"; fi
}

answers() { # answers URL: whether something says 200 there
    "$PYTHON" -c '
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the loopback needs no proxy
sys.exit(opener.open(sys.argv[1], timeout=2).status != 200)' "$1" 2>/dev/null
}

knows_nodes() { # Ray answers `ray status` a few seconds after it takes jobs; its exit status is 0 before that too
    ray status --address "127.0.0.1:$PORT" 2>/dev/null | grep -q "Node status"
}

cpus() { # Ray counts logical CPUs; with fewer than four a training worker waits for ever for its own input
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    echo $((cores > 4 ? cores : 4))
}

start() {
    local pid options launch=() waited=0
    pid=$(head_pid)
    if [ -n "$pid" ]; then
        echo "runs already (pid $pid)"
        where
        return
    fi
    "$PYTHON" -c 'import ray' 2>/dev/null || die "$PYTHON has no ray: activate the environment, or set PYTHON"
    mkdir -p "$DIR"
    options=(
        --head --block --temp-dir="$DIR" --node-ip-address=127.0.0.1 --port="$PORT" --disable-usage-stats
        --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT"
        --dashboard-agent-listen-port="$AGENT_PORT" --ray-client-server-port="$CLIENT_PORT"
        --metrics-export-port="$METRICS_PORT" --num-cpus="${KGRAY_RAY_CPUS:-$(cpus)}"
    )
    if [ -n "${KGRAY_RAY_OBJECT_STORE:-}" ]; then options+=(--object-store-memory="$KGRAY_RAY_OBJECT_STORE"); fi
    # A session of its own: the terminal's Ctrl-C and hang-up do not reach it, and stop can end all of it.
    if command -v setsid >/dev/null; then launch=(setsid); fi
    nohup "${launch[@]}" "$PYTHON" -m ray.scripts.scripts start "${options[@]}" >"$LOG" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$PID_FILE"
    # The dashboard answers before its agent can take a job; without the agent a submission is refused.
    until answers "http://127.0.0.1:$DASHBOARD_PORT/api/version" &&
        answers "http://127.0.0.1:$AGENT_PORT/api/local_raylet_healthz" &&
        knows_nodes; do
        if ! kill -0 "$pid" 2>/dev/null; then
            rm -f "$PID_FILE"
            tail -n 20 "$LOG" >&2
            die "Ray did not start; the whole log is $LOG"
        fi
        waited=$((waited + 1))
        if [ "$waited" -gt 120 ]; then
            stop
            die "Ray did not answer within two minutes; its log is $LOG"
        fi
        sleep 1
    done
    echo "started (pid $pid)"
    where
}

where() {
    echo "dashboard and jobs  http://127.0.0.1:$DASHBOARD_PORT"
    echo "in this shell       export RAY_ADDRESS=127.0.0.1:$PORT"
    echo "submit a job        ray job submit --address http://127.0.0.1:$DASHBOARD_PORT --working-dir . -- python -m jobs.pipeline configs/quickstart.yaml"
    echo "log                 $LOG"
}

stop() {
    local pid waited=0
    pid=$(head_pid)
    if [ -z "$pid" ]; then
        rm -f "$PID_FILE"
        echo "does not run"
        return
    fi
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do
        waited=$((waited + 1))
        if [ "$waited" -gt 60 ]; then
            kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
        fi
        sleep 0.5
    done
    rm -f "$PID_FILE"
    echo "stopped"
}

status() {
    local pid
    pid=$(head_pid)
    if [ -z "$pid" ]; then
        echo "does not run"
        return 1
    fi
    echo "runs (pid $pid)"
    where
    ray status --address "127.0.0.1:$PORT"
}

case "${1:-}" in
start | stop | status) "$1" ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
