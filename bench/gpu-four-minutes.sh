#!/usr/bin/env bash
# The rerun of gpu-ten-minutes.sh within 240 s: parity, the encoder and the engine, or the phases that are named.
#   bench/gpu-four-minutes.sh [--dry-run] [--out DIR] [PHASE...]
exec "$(dirname "$0")/gpu-ten-minutes.sh" --four-minutes "$@"
