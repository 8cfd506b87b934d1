#!/usr/bin/env bash
# What a GPU takes, in ten minutes at most: bash studies/gpu.sh. Into a new folder gpu/DATE: what was
# said, and the figures. What was expected: docs/imagenet.md, "Predictions".
set -u
cd "$(dirname "$0")/.."
export TQDM_DISABLE=1
out=gpu/$(date +%F-%H%M)
mkdir -p "$out"
nvidia-smi > "$out/card.txt" || exit

# Training at size L, its micro-batch, plain and compiled: tokens a second, MFU, memory. Sampling in
# 256, 88 and 48 steps at batch 64, 8, 1, eager and compiled, in 88 as a CUDA graph, and the floors.
timeout 270 python -m studies.bench --size L --seconds 10 --device cuda --out "$out/L" 2>&1 |
    tee "$out/L.txt"

# RAR-B with the cache, tokens alone and to pixels, eager and compiled
timeout 90 python -m studies.bench --rar B --batch-size 128 --seconds 10 --device cuda 2>&1 |
    tee "$out/rar_B.txt"

# Sampling at size XXL
timeout 230 python -m studies.bench --size XXL --no-training --seconds 20 --device cuda --out "$out/XXL" \
    2>&1 | tee "$out/XXL.txt"
