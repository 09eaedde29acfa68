#!/usr/bin/env bash
# Start an MLflow server, to view trainings in a browser and to record them from several machines.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: mlflow/serve.sh [FOLDER] [MLFLOW SERVER OPTION]...

Serve FOLDER/mlflow.db (created if it does not exist) with artifacts in FOLDER/mlartifacts.
FOLDER is the folder of your runs (default: out/runs).

  mlflow/serve.sh                            view trainings of this machine: http://127.0.0.1:5000
  mlflow/serve.sh out/runs --port 5001       on another port
  mlflow/serve.sh /srv/catgan --host 0.0.0.0 --allowed-hosts 'gpu0:5000,127.0.0.1:*'
                                             record trainings of other machines, which reach this one as
                                             gpu0 and train with --track.uri http://gpu0:5000

It is reachable from this machine only, unless --host is given: it has no passwords.
Stop it with Ctrl-C. `mlflow server --help` lists all options.
HELP
}

folder=out/runs
case ${1-} in
  -h | --help) usage; exit 0 ;;
  -* | '') ;;
  *) folder=$1; shift ;;
esac
if ! mkdir -p -- "$folder" 2>/dev/null || [ ! -w "$folder" ]; then
  echo "serve.sh: cannot write in $folder; give another folder" >&2
  exit 2
fi
folder=$(CDPATH='' cd -- "$folder" && pwd)

# MLflow decodes both as URLs. trainer/tracking/server.py does the same, and says why the driver is named.
encoded=${folder//%/%25}
encoded=${encoded//\?/%3F}
[ "$encoded" = "$folder" ] && scheme=sqlite || scheme=sqlite+pysqlite
artifacts=${encoded//#/%23}

# From the virtual environment of this checkout, otherwise from PATH.
mlflow=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/mlflow
[ -x "$mlflow" ] || mlflow=$(command -v mlflow) || {
  echo "serve.sh: mlflow is not installed: pip install 'catgan[train]', or run make first" >&2
  exit 2
}

export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY-true}
# It would start seven more processes, which only serve evaluations of language models.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION-false}
# One worker: SQLite allows one writer at a time, and each worker takes a second to start and about 200 MB of memory.
# In the background, where it does not get the terminal's Ctrl-C: MLflow would answer that with a traceback.
"$mlflow" server --backend-store-uri "$scheme:///$encoded/mlflow.db" \
  --artifacts-destination "$artifacts/mlartifacts" --host 127.0.0.1 --port 5000 --workers 1 "$@" &
server=$!
interrupted= stopped=
trap 'interrupted=yes stopped=yes; kill -TERM "$server" 2>/dev/null || true' INT
trap 'stopped=yes; kill -TERM "$server" 2>/dev/null || true' TERM
# A signal ends `wait` before the server ends.
while :; do
  wait "$server" && status=0 || status=$?
  kill -0 "$server" 2>/dev/null || break
done
if [ -z "$stopped" ] && [ "$status" = 0 ]; then  # MLflow's status for a port in use, too
  echo "serve.sh: the server has ended by itself, see its messages; is the port in use? --port gives another" >&2
  status=1
fi
[ -z "$interrupted" ] || { echo "serve.sh: stopped" >&2; status=130; }
exit "$status"
