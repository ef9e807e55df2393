#!/usr/bin/env bash
# Qwen2.5-1.5B, ZeRO-2 on 4 x A100-SXM4-80GB. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 8 x 2 accumulation steps = 64 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing full, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more arguments of src/open_r1/sft.py, such as --dataset_name=NAME --max_steps=1000]

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v accelerate > /dev/null || {
  echo "run.sh: accelerate is not installed; pip install 'open-r1 @ git+https://github.com/huggingface/open-r1'" >&2
  exit 1
}

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

exec accelerate launch \
  --config_file "$here/zero2.yaml" \
  --deepspeed_config_file "$here/zero2.json" \
  src/open_r1/sft.py \
  --model_name_or_path=org/Qwen2.5-1.5B \
  --torch_dtype=bfloat16 \
  --attn_implementation=sdpa \
  --max_length=2048 \
  --packing=true \
  --padding_free=false \
  --activation_offloading=false \
  --per_device_train_batch_size=8 \
  --gradient_accumulation_steps=2 \
  --gradient_checkpointing=true \
  '--gradient_checkpointing_kwargs={"use_reentrant": false}' \
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
  --dataset_name=HuggingFaceH4/Bespoke-Stratos-17k \
  --output_dir=data/Qwen2.5-1.5B-Open-R1-Distill \
  "$@"
