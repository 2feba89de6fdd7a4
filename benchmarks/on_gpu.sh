#!/usr/bin/env bash
# Everything that only a GPU can show, in so many minutes: bash benchmarks/on_gpu.sh [minutes]
# Without a GPU, small and for the command's own sake: bash benchmarks/on_gpu.sh --rehearse [minutes]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
ulimit -c 0 # a part that crashes leaves no image of its memory
exec "${PYTHON:-$(command -v python || command -v python3)}" -m benchmarks.on_gpu "$@"
