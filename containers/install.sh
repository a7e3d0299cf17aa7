#!/bin/sh
# Installs the project's environment in an image of Ubuntu 24.04, for Dockerfile and srpo.def:
#   install.sh SOURCE TARGET DEVICE [WHEELHOUSE]
# SOURCE is the checkout, TARGET the folder in the image, DEVICE gpu or cpu, and WHEELHOUSE a folder of `make wheelhouse`
# from which everything is installed without a package index (Ubuntu's own packages still come from its archive).
set -eu
source=$1 target=$2 device=$3 wheelhouse=${4:-}

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# A compiler and Python's headers: torch, Triton and vLLM compile small programs when they run. The libraries of
# InfiniBand: NCCL loads them when it runs, and uses TCP without them. numactl's: vLLM asks it for the CPUs of a GPU.
apt-get install -y -qq --no-install-recommends \
  python3.12 python3.12-venv python3.12-dev g++ make git ca-certificates \
  libibverbs1 ibverbs-providers librdmacm1t64 libnuma1 >/dev/null
rm -rf /var/lib/apt/lists/*

mkdir -p "$target"
for part in megatron_srpo slurm tools requirements configs examples docs Makefile pyproject.toml README.md LICENSE; do
  cp -R "$source/$part" "$target/"
done
cd "$target"
python3.12 tools/setup_env.py --device "$device" ${wheelhouse:+--wheelhouse "$wheelhouse"}
rm -rf "$HOME/.cache/pip"
