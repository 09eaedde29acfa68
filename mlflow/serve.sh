#!/usr/bin/env bash
# Start an MLflow server: a web page to look at trainings, and an address to log them to.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: mlflow/serve.sh [FOLDER] [MLFLOW SERVER OPTION]...

Serve FOLDER/mlflow.db (made if it is not there) with its artifacts in FOLDER/mlartifacts.
FOLDER is where your runs are (default: out/runs).

  mlflow/serve.sh                            look at what was trained here: http://127.0.0.1:5000
  mlflow/serve.sh out/runs --port 5001       on another port
  mlflow/serve.sh /srv/catgan --host 0.0.0.0 --allowed-hosts 'gpu0:5000,127.0.0.1:*'
                                             for other machines, which call this one gpu0 and train with
                                             --track.uri http://gpu0:5000

It listens to this machine only unless --host says otherwise: MLflow asks nobody for a password by itself.
Stop it with Ctrl-C. `mlflow server --help` lists all options.
HELP
}

folder=out/runs
case ${1-} in
  -h | --help) usage; exit 0 ;;
  -* | '') ;;
  *) folder=$1; shift ;;
esac
if ! mkdir -p "$folder" 2>/dev/null || [ ! -w "$folder" ]; then
  echo "serve.sh: cannot write in $folder; give another folder" >&2
  exit 2
fi
folder=$(cd "$folder" && pwd)

# The environment of this checkout, else whatever is active.
mlflow=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/mlflow
[ -x "$mlflow" ] || mlflow=$(command -v mlflow) || {
  echo "serve.sh: mlflow is not installed: pip install 'catgan[train]', or run make first" >&2
  exit 2
}

export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY-true}
# Seven more processes that serve language-model evaluations only.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION-false}
# One worker: SQLite takes one writer at a time, and each more costs a second to start and some 200 MB.
exec "$mlflow" server --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/mlartifacts" \
  --host 127.0.0.1 --port 5000 --workers 1 "$@"
