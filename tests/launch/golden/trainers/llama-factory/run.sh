#!/usr/bin/env bash
# Qwen2.5-1.5B, ZeRO-2 on 4 x A100-SXM4-80GB. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 16 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing full, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more settings for the YAML, such as dataset=NAME template=NAME max_steps=1000]

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v torchrun > /dev/null || {
  echo "run.sh: torchrun is not installed; pip install llamafactory==0.9.5 deepspeed" >&2
  exit 1
}

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

export ACCELERATE_USE_DEEPSPEED=true
export ACCELERATE_DEEPSPEED_CONFIG_FILE="$here/ds_config.json"
export ACCELERATE_DEEPSPEED_ZERO3_INIT=false

exec torchrun \
  --standalone \
  --nproc-per-node=4 \
  --module \
  -- \
  llamafactory.launcher \
  "$here/llama_factory.yaml" \
  deepspeed="$here/ds_config.json" \
  "$@"
