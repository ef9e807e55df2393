"""What stands around a trainer's arguments: its own command, its versions, and scripts of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from advisor.catalog import trainers
from advisor.catalog.models import find_model
from advisor.errors import SpecError
from advisor.launch.files import render
from advisor.specs.job import Job, Trainer
from advisor.specs.megatron import MegatronSettings
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Strategy
from launch.examples import PLANS_OF_EVERY_KIND, cluster, model, plan
from launch.started import Started
from launch.trainers.told import ARGUMENTS, command_of, launch_for, text_of, told


@pytest.mark.parametrize(
    ("trainer", "strategy", "command"),
    [
        ("trl", Strategy.ZERO2, "trl sft --config sft.yaml --accelerate_config accelerate.yaml"),
        (
            "axolotl",
            Strategy.ZERO2,
            "axolotl train axolotl.yaml --deepspeed=ds_config.json --launcher=accelerate -- "
            "--config_file accelerate.yaml",
        ),
        ("llama-factory", Strategy.ZERO2, "llamafactory-cli train llama_factory.yaml deepspeed=ds_config.json"),
        ("llama-factory", Strategy.FSDP, "llamafactory-cli train llama_factory.yaml"),
        ("torchtitan", Strategy.FSDP, "bash run.sh"),
    ],
)
def test_what_to_type_is_the_trainers_own_command(trainer: Trainer, strategy: Strategy, command: str) -> None:
    assert " ".join(launch_for(trainer, plan(strategy)).command) == command


def test_llama_factorys_command_starts_as_many_processes_as_there_are_gpus_and_says_who_shards() -> None:
    environment = launch_for("llama-factory", plan(Strategy.FSDP, gpus=4)).environment

    assert (
        environment.items()
        >= {
            "FORCE_TORCHRUN": "1",
            "NPROC_PER_NODE": "4",
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
        }.items()
    )


def test_llama_factorys_command_would_tear_a_word_with_a_blank() -> None:
    launch = launch_for("llama-factory", plan(Strategy.ZERO2), "dataset=my data")

    assert launch.command == ("bash", "run.sh")


@pytest.mark.parametrize(
    ("versions", "there", "not_there"),
    [
        ({"trl": "0.15.2", "transformers": "4.48.3"}, {"max_seq_length", "torch_dtype"}, {"packing_strategy", "dtype"}),
        ({"trl": "0.22.2", "transformers": "4.55.4"}, {"max_length", "torch_dtype", "packing_strategy"}, {"loss_type"}),
        (
            {"trl": "1.16.0", "transformers": "5.22.0"},
            {"gradient_checkpointing", "dtype"},
            {"activation_checkpointing"},
        ),
        ({"trl": "1.16.0", "transformers": "5.23.0"}, {"activation_checkpointing"}, {"gradient_checkpointing"}),
    ],
)
def test_flags_are_those_of_the_version_that_is_installed(
    versions: dict[str, str], there: set[str], not_there: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "installed", versions.get)
    loss = "tiled" if versions["trl"] == "1.16.0" else "full"

    names = told("trl", launch_for("trl", plan(Strategy.ZERO2), loss=loss)).keys()

    assert there <= names
    assert not not_there & names


def test_ligers_loss_comes_without_its_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "installed", {"trl": "1.0.0", "transformers": "4.57.1"}.get)
    given = told("trl", launch_for("trl", plan(Strategy.ZERO2), loss="fused"))
    monkeypatch.setattr(trainers, "installed", {"trl": "0.18.2", "transformers": "4.52.4"}.get)

    assert given["use_liger_kernel"]
    assert [name for name, on in given["liger_kernel_config"].items() if on] == ["fused_linear_cross_entropy"]
    with pytest.raises(SpecError, match=r"transformers 4.52.4 cannot take Liger's loss without its other kernels"):
        launch_for("trl", plan(Strategy.ZERO2), loss="fused")


@pytest.mark.parametrize(
    ("trainer", "word", "complaint"),
    [
        ("trl", "--max_seq_length=4096", r"trl [\d.]+ has no --max_seq_length since 0.20.0; give --max_length"),
        (
            "trl",
            "--evaluation_strategy=no",
            r"transformers [\d.]+ has no --evaluation_strategy since 4.51.0; give --eval",
        ),
        (
            "llama-factory",
            "save_safetensors=true",
            r"transformers [\d.]+ has no --save_safetensors since 5.0.0; leave",
        ),
    ],
)
def test_a_users_word_that_is_gone_is_refused(trainer: Trainer, word: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        launch_for(trainer, plan(Strategy.ZERO2), word)


@pytest.mark.parametrize("trainer", ["hf", "trl", "open-r1", "llama-factory", "axolotl"])
def test_a_bare_configuration_has_no_weights_to_load(trainer: Trainer) -> None:
    with pytest.raises(SpecError, match=r"loads weights, which some/config.json has none of"):
        launch_for(trainer, plan(Strategy.ZERO2), weights_from="some/config.json")


# Where a program starts by itself on several machines, or shares out the cores, is asked of each machine.
@pytest.mark.parametrize("trainer", ["trl", "llama-factory", "axolotl", "open-r1"])
def test_several_machines_and_offload_start_by_run_sh(trainer: Trainer) -> None:
    offloaded = launch_for(trainer, plan(Strategy.ZERO2, offload=Offload.OPTIMIZER))

    assert launch_for(trainer, plan(Strategy.ZERO2, gpus=4), nodes=2).command == ("bash", "run.sh")
    assert offloaded.command == ("bash", "run.sh")


@pytest.mark.parametrize("trainer", ["torchtitan", "megatron"])
def test_slurm_starts_by_torchrun_what_spreads_a_model_itself(trainer: Trainer) -> None:
    chosen = plan(Strategy.FSDP if trainer == "torchtitan" else Strategy.MEGATRON, gpus=4)
    launch = launch_for(trainer, chosen, target="slurm", nodes=2)

    assert launch.command == ("sbatch", "job.sbatch")
    assert "exec torchrun" in text_of(launch, "run.sh")
    assert "ACCELERATE" not in text_of(launch, "run.sh")


@pytest.mark.parametrize("kind", PLANS_OF_EVERY_KIND)
def test_a_script_of_ones_own_is_started_by_the_plans_launcher(kind: str, tmp_path: Path) -> None:
    chosen = PLANS_OF_EVERY_KIND[kind]
    words = ("my folder/my script.py", "--my-flag", "a $(touch pwned) 'b'")
    launch = render(model(), Job(), chosen, cluster(int(chosen.gpus)), more_arguments=words)

    started = Started(tmp_path, launch, "--more")

    assert started.arguments[0] == "launch"
    assert started.arguments[-4:] == [*words, "--more"]
    assert "train.py" not in {file.name for file in launch.files}
    assert "micro-batch 2, 2 accumulation steps" in launch.notes[0]
    assert not list(tmp_path.rglob("pwned"))


def test_megatron_is_told_how_the_model_is_cut() -> None:
    cut = plan(
        Strategy.MEGATRON,
        gpus=16,
        tensor_parallel=2,
        sequence_parallel=True,
        pipeline_parallel=1,
        context_parallel=2,
        checkpointing=Checkpointing.SELECTIVE,
    )
    words = set(command_of(launch_for("megatron", cut, nodes=2)))

    assert {
        "--tensor-model-parallel-size=2",
        "--pipeline-model-parallel-size=1",
        "--context-parallel-size=2",
        "--sequence-parallel",
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
        "--recompute-modules=core_attn",
        "--micro-batch-size=2",
        # 16 GPUs / 4 = 4 copies of the model x micro-batch 2 x 2 accumulation steps.
        "--global-batch-size=16",
    } <= words


def test_megatron_is_told_of_experts_and_latent_attention() -> None:
    spread = plan(Strategy.MEGATRON, gpus=8, expert_parallel=4, micro_batch=1)
    words = set(command_of(render(find_model("DeepSeek-V2-Lite").model, Job(trainer="megatron"), spread, cluster(8))))

    assert {each.removeprefix("--").partition("=")[0] for each in words if each.startswith("--")} <= ARGUMENTS[
        "megatron"
    ]
    assert {
        "--expert-model-parallel-size=4",
        "--expert-tensor-parallel-size=1",
        "--num-experts=64",
        "--moe-router-topk=6",
        "--moe-ffn-hidden-size=1408",
        "--moe-shared-expert-intermediate-size=2816",
        # Its first layer is dense.
        "--moe-layer-freq=([0]*1+[1]*26)",
        "--moe-router-pre-softmax",
        "--moe-router-dtype=fp32",
        "--moe-token-dispatcher-type=alltoall",
        "--moe-grouped-gemm",
        "--moe-permute-fusion",
        "--multi-latent-attention",
        "--kv-lora-rank=512",
    } <= words
    assert not any("q-lora-rank" in each or "query-groups" in each for each in words)


def test_megatron_is_told_what_is_exchanged_deferred_and_uneven() -> None:
    own = MegatronSettings(
        context_exchange="a2a",
        optimizer_instances=2,
        deferred_micro_batches=1,
        first_stage_layers=1,
        last_stage_layers=1,
    )
    chosen = plan(Strategy.MEGATRON, gpus=8, context_parallel=2, pipeline_parallel=2, megatron=own)
    words = set(command_of(launch_for("megatron", chosen)))

    said = {
        "--cp-comm-type=a2a",
        "--num-distributed-optimizer-instances=2",
        "--defer-embedding-wgrad-compute",
        "--wgrad-deferral-limit=1",
        "--decoder-first-pipeline-num-layers=1",
        "--decoder-last-pipeline-num-layers=1",
    }
    assert said <= words
    assert {each.removeprefix("--").partition("=")[0] for each in said} <= ARGUMENTS["megatron"]


def test_megatrons_virtual_stages_are_told_by_their_layers() -> None:
    interleaved = plan(Strategy.MEGATRON, gpus=2, pipeline_parallel=2)
    plain = set(command_of(launch_for("megatron", interleaved)))
    four = model()
    four = replace(four, runs=tuple(replace(each, repeats=8) for each in four.runs))
    chosen = replace(interleaved, virtual_stages=2)
    launch = render(four, Job(trainer="megatron"), chosen, cluster(2))

    assert not any(each.startswith("--num-layers-per-virtual") for each in plain)
    # 8 layers over 2 stages x 2 runs.
    assert "--num-layers-per-virtual-pipeline-stage=2" in command_of(launch)


def test_megatrons_settings_are_switches() -> None:
    chosen = MegatronSettings(overlaps_gradients=False, fuses_gradient_sums=False, mask_in_batch=False)
    words = set(command_of(launch_for("megatron", plan(Strategy.MEGATRON, megatron=chosen))))

    assert {"--no-gradient-accumulation-fusion", "--no-create-attention-mask-in-dataloader"} <= words
    assert "--overlap-grad-reduce" not in words


def test_a_schedule_that_megatron_lacks_is_refused() -> None:
    chosen = plan(Strategy.MEGATRON, pipeline_parallel=2, megatron=MegatronSettings(pipeline_schedule="gpipe"))
    with pytest.raises(SpecError, match="Megatron runs the schedule 1f1b, not gpipe"):
        launch_for("megatron", chosen)


def test_megatrons_plan_is_for_its_own_trainer() -> None:
    with pytest.raises(SpecError, match="is not run by the script that advisor writes; give --trainer megatron"):
        render(model(), Job(), plan(Strategy.MEGATRON), cluster())


def test_megatron_is_told_the_models_shape() -> None:
    chosen = plan(Strategy.MEGATRON, checkpointing=Checkpointing.FULL)
    words = set(command_of(launch_for("megatron", chosen)))

    assert {
        "--num-layers=2",
        "--hidden-size=32",
        "--ffn-hidden-size=64",
        "--num-attention-heads=4",
        "--num-query-groups=2",
        "--kv-channels=8",
        "--normalization=RMSNorm",
        "--swiglu",
        "--recompute-granularity=full",
        "--recompute-num-layers=1",
    } <= words
    assert "--untie-embeddings-and-output-weights" not in words


def test_torchtitan_shards_within_machines_where_the_plan_does() -> None:
    hybrid = plan(Strategy.HSDP, gpus=16, fsdp=FsdpSettings(shard_ranks=8))
    given = told("torchtitan", launch_for("torchtitan", hybrid, nodes=2))

    assert given["parallelism.data_parallel_replicate_degree"] == 2
    assert given["parallelism.data_parallel_shard_degree"] == 8
    assert given["parallelism.fsdp_reshard_after_forward"] == "always"


def test_torchtitan_names_the_models_that_it_has() -> None:
    with pytest.raises(SpecError, match=r"torchtitan has no tiny; it has Llama-3.1-8B, Llama-3.1-70B"):
        render(model(), Job(trainer="torchtitan"), plan(Strategy.FSDP), cluster())


def test_torchtitan_without_a_configuration_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "installed", {"torchtitan": "0.3.0"}.get)

    with pytest.raises(
        SpecError, match=r"torchtitan 0.3.0 reads no configuration file; pip install 'torchtitan<0.3.0'"
    ):
        launch_for("torchtitan", plan(Strategy.FSDP))
