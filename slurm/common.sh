# Sourced by slurm/srpo_*.sh with the configuration and the script's own arguments. What a site changes is in site.env.
set -euo pipefail
SCRIPT_NODES=$(sed -n 's/^#SBATCH --nodes=//p' "${BASH_SOURCE[1]}") # what a dry run shows
SCRIPT=${BASH_SOURCE[1]} # whose header a dry run shows
export SCRIPT_NODES SCRIPT
cd "${SLURM_SUBMIT_DIR:-.}"
site=${SRPO_SITE:-slurm/site.env}
if [ -f "$site" ]; then
  set -a
  . "$site"
  set +a
fi
if [ -n "${SRPO_MODULES:-}" ]; then
  set +u # not every site's `module` stands it
  # shellcheck disable=SC2086  # one word a module
  module load $SRPO_MODULES
  set -u
fi
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "${SRPO_HOST_PYTHON:-$python}" -m slurm.launch "$@"
