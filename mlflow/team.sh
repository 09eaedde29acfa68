#!/usr/bin/env bash
# Start an MLflow server for a team: users with passwords, records in PostgreSQL, artifacts in S3.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: mlflow/team.sh [MLFLOW SERVER OPTION]...

All settings are environment variables. Those marked * are secrets, which can also be given as NAME_FILE=PATH: the first
line of a file that only you can read.

  PGHOST, PGUSER, PGDATABASE        the PostgreSQL database, and other variables of its clients (PGPORT, PGSSLMODE...);
                                    the first start creates the tables
  PGPASSWORD *                      the password of PGUSER
  MLFLOW_ARTIFACTS_DESTINATION      s3://BUCKET/FOLDER; credentials come from the usual AWS_* variables or the
                                    machine's role; MLFLOW_S3_ENDPOINT_URL is the address of a store other than AWS
  MLFLOW_AUTH_ADMIN_PASSWORD *      of the user "admin", at least 12 characters; only the first start needs it
  MLFLOW_FLASK_SERVER_SECRET_KEY *  any long random text; it must stay the same
  MLFLOW_SERVER_ALLOWED_HOSTS       host names that clients use (default: 127.0.0.1 and localhost)
  MLFLOW_HOST, MLFLOW_PORT          address to listen on (default: 127.0.0.1, 5000)

  export PGHOST=127.0.0.1 PGUSER=mlflow PGDATABASE=mlflow PGPASSWORD_FILE=~/secrets/db
  export MLFLOW_AUTH_ADMIN_PASSWORD_FILE=~/secrets/admin MLFLOW_FLASK_SERVER_SECRET_KEY_FILE=~/secrets/flask
  export MLFLOW_ARTIFACTS_DESTINATION=s3://cats/mlflow
  mlflow/team.sh

Passwords are sent unencrypted: give others access through SSH or an HTTPS proxy. Stop it with Ctrl-C.
HELP
}

fail() { echo "team.sh: $1" >&2; exit 2; }

case ${1-} in -h | --help) usage; exit 0 ;; esac

for name in PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY; do
  file=${name}_FILE
  if [ -n "${!file-}" ]; then
    [ -r "${!file}" ] || fail "$file=${!file} cannot be read"
    export "$name=$(head -n 1 "${!file}")"
  fi
done
for name in PGHOST PGUSER PGDATABASE MLFLOW_ARTIFACTS_DESTINATION MLFLOW_FLASK_SERVER_SECRET_KEY; do
  [ -n "${!name-}" ] || fail "$name is not set; team.sh --help describes it"
done

here=$(cd "$(dirname "$0")" && pwd)
# From the virtual environment of this checkout, otherwise from PATH.
mlflow=$here/../.venv/bin/mlflow
[ -x "$mlflow" ] || mlflow=$(command -v mlflow) || fail "mlflow is not installed: pip install 'catgan[server]'"

export MLFLOW_AUTH_CONFIG_PATH=$here/basic_auth.ini
export MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-127.0.0.1:*,localhost:*}
export MLFLOW_HOST=${MLFLOW_HOST:-127.0.0.1} MLFLOW_WORKERS=${MLFLOW_WORKERS:-2}
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY-true}
# It would start seven more processes, which only serve evaluations of language models.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION-false}
# A URI without a host takes everything from PGHOST etc., so that the list of processes shows no password.
exec "$mlflow" server --app-name basic-auth --serve-artifacts --backend-store-uri postgresql+psycopg2:// "$@"
