# Sourced by slurm/srpo_*.sh with the configuration and the script's own arguments. What a site changes is in site.env.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
site=${SRPO_SITE:-slurm/site.env}
if [ -f "$site" ]; then
  set -a
  . "$site"
  set +a
fi
# shellcheck disable=SC2086  # one word a module
if [ -n "${SRPO_MODULES:-}" ]; then module load $SRPO_MODULES; fi
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "${SRPO_HOST_PYTHON:-$python}" -m slurm.launch "$@"
