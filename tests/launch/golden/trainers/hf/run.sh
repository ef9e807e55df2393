#!/usr/bin/env bash
# Qwen2.5-1.5B, ZeRO-2 on 4 x A100-SXM4-80GB. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 16 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing full, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more arguments of run_clm.py, such as --train_file=FILE --max_steps=1000]

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v accelerate > /dev/null || {
  echo "run.sh: accelerate is not installed; pip install transformers==5.23.0 accelerate deepspeed datasets evaluate scikit-learn" >&2
  exit 1
}

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

exec accelerate launch \
  --config_file "$here/accelerate.yaml" \
  --deepspeed_config_file "$here/ds_config.json" \
  run_clm.py \
  --model_name_or_path=org/Qwen2.5-1.5B \
  --dtype=bfloat16 \
  --block_size=2048 \
  --per_device_train_batch_size=2 \
  --gradient_accumulation_steps=2 \
  --activation_checkpointing=true \
  '--activation_checkpointing_kwargs={"use_reentrant": false}' \
  --bf16=true \
  --fp16=false \
  --optim=adamw_torch_fused \
  --learning_rate=2e-05 \
  --weight_decay=0.0 \
  --adam_beta1=0.9 \
  --adam_beta2=0.999 \
  --adam_epsilon=1e-08 \
  --max_grad_norm=1.0 \
  --torch_compile=false \
  --auto_find_batch_size=false \
  --ddp_find_unused_parameters=false \
  --use_liger_kernel=false \
  --eval_strategy=no \
  --do_train=true \
  --dataset_name=wikitext \
  --dataset_config_name=wikitext-2-raw-v1 \
  --output_dir=output \
  "$@"
