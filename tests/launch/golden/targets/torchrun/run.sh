#!/usr/bin/env bash
# Qwen2.5-1.5B, ZeRO-2 on 4 x A100-SXM4-80GB in 2 machines. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 16 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing full, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more arguments of train.py, such as --dataset=FILE --steps=1000 --output=FOLDER --resume=auto]
# On each machine, set NODE_RANK to its number, from 0, and MAIN_ADDRESS to the host of machine 0.

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v torchrun > /dev/null || {
  echo "run.sh: torchrun is not installed; pip install torch transformers accelerate deepspeed" >&2
  exit 1
}

: "${NODE_RANK:?set it to the number of this machine, 0 to 1}"
: "${MAIN_ADDRESS:?set it to the host name or address of machine 0}"
MAIN_PORT="${MAIN_PORT:-29500}"

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

export ACCELERATE_USE_DEEPSPEED=true
export ACCELERATE_DEEPSPEED_CONFIG_FILE="$here/ds_config.json"
export ACCELERATE_DEEPSPEED_ZERO3_INIT=false

exec torchrun \
  --nproc-per-node=2 \
  --nnodes=2 \
  --node-rank="$NODE_RANK" \
  --rdzv-backend=c10d \
  --rdzv-id=advisor \
  --rdzv-endpoint="$MAIN_ADDRESS:$MAIN_PORT" \
  --rdzv-conf="is_host=$(( NODE_RANK == 0 ))" \
  -- \
  "$here/train.py" \
  --model=org/Qwen2.5-1.5B \
  --objective=causal \
  --weights=bf16 \
  --attention=sdpa \
  --checkpointing=full \
  --sequence-length=2048 \
  --micro-batch=2 \
  --accumulation-steps=2 \
  --optimizer=adamw-fused \
  "$@"
