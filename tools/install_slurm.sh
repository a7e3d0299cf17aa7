#!/bin/sh
# Installs Debian's (Ubuntu's) Slurm for `make test-slurm`, where it is not there yet and this user may. Never fails:
# without Slurm the tests are skipped and say why.
packages="slurmctld slurmd slurm-client munge"
PATH="$PATH:/usr/sbin:/usr/local/sbin:/sbin"
missing=
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
  echo "Slurm is not installed (no$missing), and this system has no apt-get: install $packages by its own means"
  exit 0
fi
as_root=
if [ "$(id -u)" != 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "Slurm is not installed (no$missing), and this user may not: sudo apt-get install $packages"
    exit 0
  fi
  as_root="sudo -n"
fi
echo "installing $packages (apt-get); no service is left running"
$as_root apt-get update -qq || true
if $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null; then
  # Where there is an init system the packages start services; the tests bring their own daemons.
  for program in $missing; do
    [ "$program" = munged ] && service=munge || service=$program
    $as_root systemctl disable --now "$service" >/dev/null 2>&1 || true
  done
else
  echo "apt-get could not install them; the tests are skipped"
fi
exit 0
