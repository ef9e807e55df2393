"""Jobs for Kubernetes, SkyPilot and Ray: what their own parsers make of them, and what they tell each machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from advisor.errors import SpecError
from advisor.launch.files import Launch, render
from advisor.launch.targets import DEFAULT_IMAGE, IMAGES, Target
from advisor.launch.trainers.advisor import FILES
from advisor.specs.job import Job
from advisor.specs.plan import Offload, Strategy
from launch.examples import cluster, gpu, hostile_text, model, plan
from launch.started import JOBS, container, documents, started_by
from launch.test_targets import assert_sound_bash, launch_by

KUBERNETES: tuple[Target, ...] = ("kubernetes-trainjob", "kubernetes-pytorchjob")
each_kubernetes = pytest.mark.parametrize("target", KUBERNETES)


def two_machines(target: Target, *words: str) -> Launch:
    return launch_by(target, plan(Strategy.ZERO2, gpus=4), *words, nodes=2)


@each_kubernetes
def test_each_pod_starts_run_sh_by_the_number_that_the_operator_gave_it(target: Target, tmp_path: Path) -> None:
    started = started_by(tmp_path, target, two_machines(target))

    assert started.result.returncode == 0, started.result.stderr
    at = started.arguments.index("--machine_rank")
    assert started.arguments[at + 1 : at + 6 : 2] == ["1", "10.0.0.1", "1234"]
    # Else torchrun takes them for its options, and a single process for one of several.
    assert not [name for name in started.environment() if name.startswith(("PET_", "RANK", "WORLD_SIZE", "MASTER_"))]
    assert started.recorded("pip") == "install --quiet transformers accelerate deepspeed "


def test_skypilot_names_the_first_machine(tmp_path: Path) -> None:
    started = started_by(tmp_path, "skypilot", two_machines("skypilot"))

    assert started.result.returncode == 0, started.result.stderr
    at = started.arguments.index("--machine_rank")
    assert started.arguments[at + 1 : at + 4 : 2] == ["1", "10.0.0.1"]


@each_kubernetes
def test_the_config_map_holds_what_is_written(target: Target) -> None:
    launch = two_machines(target)
    (kustomization,) = documents(launch, "kustomization.yaml")
    names = [file.name for file in launch.files]

    (files,) = kustomization["configMapGenerator"]
    assert kustomization["resources"] == [JOBS[target]]
    assert files["files"] == ["accelerate.yaml", "ds_config.json", *FILES, "run.sh"]
    assert [*files["files"], *kustomization["resources"], "kustomization.yaml"] == names
    (volume,) = [each["configMap"]["name"] for each in pod_of(target, launch)["volumes"] if "configMap" in each]
    assert volume == files["name"]


def pod_of(target: Target, launch: Launch) -> Any:
    spec = documents(launch, JOBS[target])[0]["spec"]
    if target == "kubernetes-pytorchjob":
        return spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    return spec["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@each_kubernetes
@pytest.mark.parametrize("nodes", [1, 2])
def test_there_is_one_pod_a_machine_with_all_its_gpus(target: Target, nodes: int) -> None:
    launch = launch_by(target, plan(gpus=4), nodes=nodes)
    spec = documents(launch, JOBS[target])[-1]["spec"]

    if target == "kubernetes-trainjob":
        assert spec["trainer"]["numNodes"] == nodes
    else:
        assert sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values()) == nodes
    assert container(launch)["resources"] == {"limits": {"nvidia.com/gpu": str(4 // nodes)}}


@pytest.mark.parametrize("nodes", [1, 2])
def test_kubeflows_trainer_reads_every_field(nodes: int) -> None:
    """A model of the API leaves out what it does not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime, job = documents(launch_by("kubernetes-trainjob", plan(gpus=4), nodes=nodes), "trainjob.yaml")

    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


@pytest.mark.parametrize("nodes", [1, 2])
def test_kubeflows_training_operator_reads_every_field(nodes: int) -> None:
    training, utils = (pytest.importorskip(f"kubeflow.training{part}") for part in ("", ".utils.utils"))
    (job,) = documents(launch_by("kubernetes-pytorchjob", plan(gpus=4), nodes=nodes), "pytorchjob.yaml")
    client = training.ApiClient()

    read = client.deserialize(utils.FakeResponse(job), "KubeflowOrgV1PyTorchJob")

    assert client.sanitize_for_serialization(read) == job


@pytest.mark.parametrize(("nodes", "image"), [(1, None), (2, "my/own")])
def test_skypilots_schema_takes_the_task(nodes: int, image: str | None) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = json.loads(Path(__file__).with_name("skypilot.json").read_text(encoding="utf-8"))
    (task,) = documents(launch_by("skypilot", plan(gpus=4), nodes=nodes, image=image), "task.yaml")

    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    with pytest.raises(jsonschema.ValidationError, match="'nodes' was unexpected"):
        jsonschema.validate(task | {"nodes": nodes}, schemas["task"])


@pytest.mark.parametrize("target", [*KUBERNETES, "skypilot"])
def test_scripts_inside_of_files_are_sound_bash(target: Target) -> None:
    launch = two_machines(target)
    if target == "skypilot":
        (task,) = documents(launch, "task.yaml")
        scripts = [task["run"], task["setup"]]
    else:
        scripts = [container(launch)["command"][2]]

    for script in scripts:
        assert_sound_bash(script)


@each_kubernetes
def test_no_word_of_the_plan_is_in_a_command_that_kubernetes_fills_in(target: Target) -> None:
    hostile = launch_by(target, plan(Strategy.ZERO2, gpus=4), "$(HF_HOME)", nodes=2, weights_from="$(HF_HOME)")

    assert container(hostile) == container(two_machines(target))
    assert "$(" not in container(hostile)["command"][2]


def test_what_a_config_map_cannot_hold_is_refused() -> None:
    with pytest.raises(SpecError, match=r"the files take 1,1\d\d,\d\d\d bytes, a ConfigMap holds 1,048,576: shorten"):
        two_machines("kubernetes-trainjob", "--model=" + "long" * 270_000)


@pytest.mark.parametrize("target", IMAGES)
@given(name=hostile_text, image=hostile_text)
@settings(deadline=None, max_examples=30)
def test_hostile_names_and_images_are_values_and_no_more(target: Target, name: str, image: str) -> None:
    machines = replace(cluster(), gpu=gpu("A100-SXM4-80GB"))

    launch = render(model(name), Job(), plan(), machines, weights_from="tiny", target=target, image=image)

    job = documents(launch, JOBS[target])[0]
    if target == "skypilot":
        assert job["resources"]["image_id"] == f"docker:{image}"
        assert set(job) == {"name", "workdir", "num_nodes", "resources", "setup", "run"}
    else:
        assert container(launch)["image"] == image
        assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    own_name = job["name"] if target == "skypilot" else job["metadata"]["name"]
    assert re.fullmatch("[a-z]([a-z0-9-]{0,38}[a-z0-9])?", own_name)


@each_kubernetes
def test_an_image_that_nobody_named_is_said_to_be_assumed(target: Target) -> None:
    assumed, named = launch_by(target, plan()), launch_by(target, plan(), image="my/own")

    assert container(assumed)["image"] == DEFAULT_IMAGE
    assert f"# Assumed: image {DEFAULT_IMAGE}." in text_of(assumed, JOBS[target])
    assert container(named)["image"] == "my/own"
    assert "Assumed" not in text_of(named, JOBS[target])


def text_of(launch: Launch, name: str) -> str:
    return next(file.text for file in launch.files if file.name == name)


def test_a_target_without_containers_takes_no_image() -> None:
    with pytest.raises(SpecError, match="slurm starts no container; --image is for kubernetes-trainjob, kubern"):
        launch_by("slurm", plan(), image="my/own")


def test_skypilot_is_asked_for_the_gpus_by_its_own_name() -> None:
    (task,) = documents(two_machines("skypilot"), "task.yaml")

    assert task["resources"] == {"accelerators": "A100-80GB:2"}
    assert task["num_nodes"] == 2


def test_a_gpu_that_skypilot_does_not_know_is_refused() -> None:
    with pytest.raises(SpecError, match="SkyPilot's catalog has no Test-80GB; take another GPU or another target"):
        render(model(), Job(), plan(), cluster(), target="skypilot")


@pytest.mark.parametrize("offload", [Offload.NONE, Offload.OPTIMIZER])
def test_ray_starts_a_process_for_each_gpu_with_the_settings_of_accelerate(offload: Offload, tmp_path: Path) -> None:
    launch = launch_by("ray", plan(Strategy.ZERO2, gpus=4, offload=offload), nodes=2)

    started = started_by(tmp_path, "ray", launch, "--steps=7")

    assert started.result.returncode == 0, started.result.stderr
    environment = started.environment()
    assert environment["RAY_WORKERS"] == "4"
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(started.files / "ds_config.json")
    assert started.arguments[-1] == "--steps=7"
    assert ("set_num_threads" in text_of(launch, "ray_train.py")) == offload.optimizer


@pytest.mark.parametrize("target", [*JOBS, "ray"])
@pytest.mark.parametrize(
    ("weights_from", "words", "said"),
    [
        ("org/name", (), None),
        ("/models/own", (), "# The model is given as a path: it has to be there on each machine."),
        ("org/name", ("my_script.py",), "# The script is not one of these files: it has to be there on each machine."),
    ],
)
def test_what_the_files_do_not_bring_along_is_said(
    target: Target, weights_from: str, words: tuple[str, ...], said: str | None
) -> None:
    launch = launch_by(target, plan(), *words, weights_from=weights_from)

    lines = text_of(launch, JOBS.get(target, "ray_train.py")).splitlines()

    assert [line for line in lines if "has to be there" in line] == ([said] if said else [])
