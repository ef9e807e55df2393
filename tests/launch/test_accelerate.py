"""The accelerate YAML, as accelerate's own loader and launcher read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from advisor.catalog import trainers
from advisor.launch.accelerate import (
    FSDP_REFUSES,
    LAYER_CLASSES,
    WHOLE_IN_EVERY_PROCESS,
    accelerate_environment,
    accelerate_yaml,
)
from advisor.specs.job import Job
from advisor.specs.model import Parameter, Run
from advisor.specs.plan import FsdpSettings, Plan, Strategy
from launch.examples import PLANS_OF_EVERY_KIND, cluster, model, plan

DISTRIBUTED_TYPES = {
    "one-gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp": "FSDP",
    "fsdp-grad-op": "FSDP",
    "fsdp1": "FSDP",
    "hsdp": "FSDP",
} | {name: "DEEPSPEED" for name in PLANS_OF_EVERY_KIND if name.startswith("zero")}
each_plan = pytest.mark.parametrize("kind", PLANS_OF_EVERY_KIND)

MILLION = (Parameter("weight", (1024, 1024)),)


def text(chosen: Plan, job: Job | None = None, nodes: int = 1, **model_facts: Any) -> str:
    return accelerate_yaml(model(**model_facts), job or Job(), chosen, cluster(int(chosen.gpus), nodes), ["A comment."])


def launcher_environment(folder: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What ``accelerate launch`` sets for the processes it starts."""
    launch = pytest.importorskip("accelerate.commands.launch")
    utils = pytest.importorskip("accelerate.utils.launch")
    path = folder / "accelerate.yaml"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(utils, "is_port_in_use", lambda port: False)
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    arguments, defaults, mixed_precision_from_file = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if mixed_precision_from_file else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return dict(utils.prepare_deepspeed_cmd_env(arguments)[1])
    if arguments.use_fsdp or arguments.multi_gpu:
        return dict(utils.prepare_multi_gpu_env(arguments))
    return dict(utils.prepare_simple_launcher_cmd_env(arguments)[1])


@each_plan
def test_accelerate_loads_the_file_and_finds_the_intended_type(kind: str, tmp_path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    path = tmp_path / "accelerate.yaml"
    path.write_text(text(PLANS_OF_EVERY_KIND[kind]), encoding="utf-8")

    config = config_args.load_config_from_file(str(path))

    assert config.distributed_type.value == DISTRIBUTED_TYPES[kind]
    assert config.num_processes == PLANS_OF_EVERY_KIND[kind].gpus
    assert config.num_machines == 1
    assert not config.use_cpu


@pytest.mark.parametrize(("strategy", "reshards"), [(Strategy.FSDP, True), (Strategy.FSDP_GRAD_OP, False)])
def test_the_launcher_hands_fsdps_plugin_the_plan(
    strategy: Strategy, reshards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("torch.distributed.fsdp.wrap")
    utils = pytest.importorskip("accelerate.utils")
    environment = launcher_environment(tmp_path, text(plan(strategy)), monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    plugin = utils.FullyShardedDataParallelPlugin()

    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is reshards
    assert plugin.transformer_cls_names_to_wrap == ["Qwen2DecoderLayer"]
    assert plugin.auto_wrap_policy is functional.transformer_auto_wrap_policy
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # the one that keeps all on the GPU


@pytest.mark.parametrize(
    ("strategy", "sharding"), [(Strategy.FSDP, "FULL_SHARD"), (Strategy.FSDP_GRAD_OP, "SHARD_GRAD_OP")]
)
def test_version_1_of_fsdp_is_set_up_as_it_is_modelled(
    strategy: Strategy, sharding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = pytest.importorskip("accelerate.utils")
    environment = launcher_environment(tmp_path, text(plan(strategy, fsdp=FsdpSettings(version=1))), monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment["FSDP_SYNC_MODULE_STATES"] == environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    for name in ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")  # to build the plugin, which asks for a GPU else

    plugin = utils.FullyShardedDataParallelPlugin()

    assert plugin.fsdp_version == 1
    assert plugin.sharding_strategy.name == sharding
    assert plugin.use_orig_params
    assert plugin.backward_prefetch is None
    assert not plugin.forward_prefetch


@pytest.mark.parametrize("kind", [kind for kind in PLANS_OF_EVERY_KIND if kind.startswith("zero")])
def test_the_launcher_leaves_all_but_the_file_to_deepspeed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")

    environment = launcher_environment(tmp_path, text(PLANS_OF_EVERY_KIND[kind]), monkeypatch)

    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "ds_config.json"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(kind.startswith("zero3")).lower()
    # accelerate refuses any of these beside a DeepSpeed file (DeepSpeedPlugin._deepspeed_config_checks).
    fields = set(environment["ACCELERATE_CONFIG_DS_FIELDS"].split(","))
    assert fields == {"deepspeed_config_file", "zero3_init_flag"}


@pytest.mark.parametrize(
    ("transformers", "strategy", "family", "gathered"),
    [
        ("4.57.1", Strategy.ZERO3, "qwen3_moe", "Qwen3MoeSparseMoeBlock"),
        ("4.57.1", Strategy.ZERO3, "qwen3", None),
        ("4.57.1", Strategy.ZERO2, "qwen3_moe", None),
        ("5.0.0", Strategy.ZERO3, "qwen3_moe", None),
    ],
)
def test_experts_that_a_rank_could_skip_are_gathered_at_once(
    transformers: str,
    strategy: Strategy,
    family: str,
    gathered: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainers, "installed", {"transformers": transformers}.get)
    job, name = Job(trainer="hf"), "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"

    by_accelerate = launcher_environment(tmp_path, text(plan(strategy), job, family=family), monkeypatch)

    assert by_accelerate.get(name) == gathered
    assert accelerate_environment(model(family=family), job, plan(strategy)).get(name) == gathered


@pytest.mark.parametrize(
    ("job", "mixed"),
    [
        (Job(precision="bf16"), "bf16"),
        (Job(precision="fp16"), "fp16"),
        (Job(precision="fp32"), "no"),
        (Job(precision="bf16", parameter_format="bf16"), "no"),
    ],
)
def test_autocast_runs_only_where_weights_and_products_differ(
    job: Job, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chosen in (plan(), plan(Strategy.FSDP)):
        environment = launcher_environment(tmp_path, text(chosen, job), monkeypatch)
        assert environment["ACCELERATE_MIXED_PRECISION"] == mixed


def test_several_machines_wait_for_their_rank_and_the_main_address() -> None:
    settings = yaml.safe_load(text(plan(Strategy.ZERO2, gpus=16), nodes=2))

    assert (settings["num_machines"], settings["num_processes"]) == (2, 16)
    assert settings["machine_rank"] == 0
    assert "main_process_ip" not in settings
    assert settings["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    assert "run.sh passes machine_rank" in text(plan(gpus=16), nodes=2)


def test_a_family_without_a_known_layer_leaves_it_to_the_model() -> None:
    settings = yaml.safe_load(text(plan(Strategy.FSDP), family="unheard_of"))

    assert "fsdp_transformer_layer_cls_to_wrap" not in settings["fsdp_config"]
    assert settings["fsdp_config"]["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


def test_a_state_that_cannot_be_sent_out_is_loaded_by_every_process() -> None:
    settings = yaml.safe_load(text(plan(Strategy.FSDP), family="deepseek_v3"))

    assert settings["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False


@pytest.mark.parametrize("family", LAYER_CLASSES)
def test_the_named_class_is_that_of_each_transformer_layer(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(family).get_text_config()
    layers = config.num_hidden_layers = 4  # the first three of DeepSeek-V3 have no experts
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:layers]

    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)

    named = [module for module in built.modules() if type(module).__name__ == LAYER_CLASSES[family]]
    assert len(named) == layers
    assert LAYER_CLASSES[family] in built._no_split_modules
    # Else ZeRO-3 would wait for ranks that skip an expert (SEPARATE_EXPERTS).
    assert not [name for name, _ in built.named_modules() if name.endswith("experts.0")]
    persistent_buffers = built.state_dict().keys() - dict(built.named_parameters(remove_duplicate=False)).keys()
    assert (family in WHOLE_IN_EVERY_PROCESS) == bool(persistent_buffers)


def test_no_family_is_both_named_and_refused() -> None:
    assert not FSDP_REFUSES & LAYER_CLASSES.keys()


@pytest.mark.parametrize(
    ("strategy", "family", "said"),
    [
        (Strategy.ZERO3, "qwen2", "# zero3_init_flag splits weights while they load, instead of 2 x {} host memory."),
        (
            Strategy.FSDP,
            "qwen2",
            "# fsdp_cpu_ram_efficient_loading has one process load weights, instead of 2 x {} host",
        ),
        (Strategy.FSDP, "deepseek_v3", "# Every process of a machine loads all weights: 2 x {} host memory."),
    ],
)
def test_what_loading_takes_of_the_host_is_said(strategy: Strategy, family: str, said: str) -> None:
    # The specification of a thousand layers of 2^20 weights: 2 GiB in bf16, 4 GiB in fp32.
    copy_gib = 2.0 if strategy is Strategy.ZERO3 else 4.0
    large = replace(model(family=family), runs=(Run((replace(model().runs[0].layers[0], parameters=MILLION),), 1024),))

    written = accelerate_yaml(large, Job(), plan(strategy), cluster(), [])

    assert said.format(f"{copy_gib} = {2 * copy_gib} GiB of 1,024 GiB") in written
    assert "host memory" not in text(plan(Strategy.ZERO2))


@pytest.mark.parametrize(
    ("chosen", "sizes", "more"),
    [
        (plan(Strategy.ZERO3, gpus=8, ulysses_parallel=4), (2, 1, 1, 4), {"SP_ATTN_IMPLEMENTATION": "sdpa"}),
        (plan(Strategy.FSDP, gpus=8, context_parallel=4), (1, 2, 4, 1), {"CP_COMM_STRATEGY": "allgather"}),
        (
            plan(Strategy.FSDP, gpus=8, context_parallel=8, fsdp=FsdpSettings(context_exchange="alltoall")),
            (1, 1, 8, 1),
            {"CP_COMM_STRATEGY": "alltoall"},
        ),
    ],
    ids=["ulysses", "ring at once", "ring by and by"],
)
def test_the_launcher_hands_on_how_sequences_are_cut(
    chosen: Plan, sizes: tuple[int, ...], more: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meshes = pytest.importorskip("accelerate.parallelism_config")
    environment = launcher_environment(tmp_path, text(chosen), monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    mesh = meshes.ParallelismConfig()

    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.cp_size, mesh.sp_size) == sizes
    assert mesh.data_parallel_size == (2 if chosen.strategy is Strategy.ZERO3 else sizes[1])
    assert {name: environment[f"PARALLELISM_CONFIG_{name}"] for name in more} == more
    # Launchers that start train.py without accelerate's set the same.
    own = accelerate_environment(model(), Job(), chosen)
    names = [name for name in own if "PARALLELISM" in name]
    assert len(names) > 5
    assert {name: own[name].lower() for name in names} == {name: environment[name].lower() for name in names}
