#!/usr/bin/env bash
# Qwen2.5-1.5B, ZeRO-3 + optimizer offload on 4 x A100-SXM4-80GB in 2 machines. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 16 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing none, offload optimizer.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more arguments of train.py, such as --dataset=FILE --steps=1000 --output=FOLDER --resume=auto]
# On each machine, set NODE_RANK to its number, from 0, and MAIN_ADDRESS to the host of machine 0.

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v accelerate > /dev/null || {
  echo "run.sh: accelerate is not installed; pip install torch transformers accelerate deepspeed" >&2
  exit 1
}

: "${NODE_RANK:?set it to the number of this machine, 0 to 1}"
: "${MAIN_ADDRESS:?set it to the host name or address of machine 0}"
MAIN_PORT="${MAIN_PORT:-29500}"

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

# The CPU runs the optimizer, and launchers give each process a single thread or all: share the cores instead.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  threads=$(( $(nproc) / 2 ))
  export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))
fi

exec accelerate launch \
  --config_file "$here/accelerate.yaml" \
  --deepspeed_config_file "$here/ds_config.json" \
  --machine_rank "$NODE_RANK" \
  --main_process_ip "$MAIN_ADDRESS" \
  --main_process_port "$MAIN_PORT" \
  "$here/train.py" \
  --model=org/Qwen2.5-1.5B \
  --objective=causal \
  --weights=bf16 \
  --attention=sdpa \
  --checkpointing=none \
  --sequence-length=2048 \
  --micro-batch=2 \
  --accumulation-steps=2 \
  --optimizer=adamw-fused \
  "$@"
