#!/usr/bin/env bash
# Qwen2.5-1.5B, Megatron tp 2 + sp, pp 2 on 4 x A100-SXM4-80GB. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 4 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing none, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Usage: bash run.sh [more arguments of pretrain_gpt.py, such as --train-iters=1000]

set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
command -v torchrun > /dev/null || {
  echo "run.sh: torchrun is not installed; pip install megatron-core==0.16.1" >&2
  exit 1
}

# Let torch's allocator grow its segments in place. Fixed ones leave gaps between tensors of different sizes, and memory
# that is reserved but unusable counts against the GPU all the same. By its older name, which every torch obeys.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-${PYTORCH_ALLOC_CONF:-expandable_segments:True}}"

exec torchrun \
  --standalone \
  --nproc-per-node=4 \
  -- \
  pretrain_gpt.py \
  --tensor-model-parallel-size=2 \
  --pipeline-model-parallel-size=2 \
  --context-parallel-size=1 \
  --num-layers=2 \
  --hidden-size=32 \
  --ffn-hidden-size=64 \
  --num-attention-heads=4 \
  --normalization=RMSNorm \
  --position-embedding-type=rope \
  --transformer-impl=transformer_engine \
  --num-query-groups=2 \
  --kv-channels=8 \
  --micro-batch-size=2 \
  --global-batch-size=4 \
  --seq-length=2048 \
  --max-position-embeddings=2048 \
  --make-vocab-size-divisible-by=128 \
  --attention-backend=fused \
  --attention-dropout=0.0 \
  --hidden-dropout=0.0 \
  --optimizer=adam \
  --lr=2e-05 \
  --adam-beta1=0.9 \
  --adam-beta2=0.999 \
  --adam-eps=1e-08 \
  --weight-decay=0.0 \
  --clip-grad=1.0 \
  --tokenizer-type=HuggingFaceTokenizer \
  --tokenizer-model=org/Qwen2.5-1.5B \
  --train-iters=100 \
  --eval-iters=0 \
  --sequence-parallel \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --overlap-param-gather \
  --swiglu \
  --disable-bias-linear \
  --group-query-attention \
  --bf16 \
  --mock-data \
  "$@"
