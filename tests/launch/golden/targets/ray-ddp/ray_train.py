# Qwen2.5-1.5B, DDP on 4 x A100-SXM4-80GB in 2 machines. Written by advisor (version).
# Batch: 4 GPUs x micro-batch 2 x 2 accumulation steps = 16 sequences of 2048 tokens per optimizer step.
# Precision bf16 over fp32 weights, adamw-fused, sdpa attention, full loss, checkpointing none, offload none.
# Names and keys as in torch 2.13, transformers 5.23, accelerate 1.15 and deepspeed 0.19.8.
# Found on the machine that wrote this: gpu A100-SXM4-80GB.
# Assumed: seq-len 2048.
# Needed on each machine: pip install 'ray[train]' torch transformers accelerate deepspeed
# Usage: ray job submit --working-dir . -- python ray_train.py [more arguments of the program], in the folder of
#   these files, with RAY_ADDRESS set to the cluster's dashboard, such as http://127.0.0.1:8265.
# Paths are those of the cluster's machines: give --output and --log as absolute ones that all of them see.

import importlib.util
import runpy
import sys
from pathlib import Path

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

# What accelerate's launcher would set, and the allocator's segments that grow in place: fixed ones leave gaps, which
# count against the GPU.
ENVIRONMENT = {
    'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True',
    'ACCELERATE_MIXED_PRECISION': 'bf16',
}


def train(settings):
    here = Path(importlib.util.find_spec("ray_train").origin).parent
    more_arguments = settings["more_arguments"]
    sys.path.insert(0, str(here))
    sys.argv = [str(here / 'train.py'), '--model=org/Qwen2.5-1.5B', '--objective=causal', '--weights=fp32', '--attention=sdpa', '--checkpointing=none', '--sequence-length=2048', '--micro-batch=2', '--accumulation-steps=2', '--optimizer=adamw-fused', *more_arguments]
    runpy.run_path(str(here / 'train.py'), run_name='__main__')


if __name__ == "__main__":
    ray.init(runtime_env={"env_vars": ENVIRONMENT})
    TorchTrainer(
        train,
        train_loop_config={"more_arguments": sys.argv[1:]},
        scaling_config=ScalingConfig(num_workers=4, use_gpu=True),
    ).fit()
