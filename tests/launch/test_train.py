"""The shipped training program: it stands alone, feeds the model what it should, and learns."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from advisor.launch.trainers import advisor
from launch.examples import write_tiny_qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FILES = {name: Path(advisor.__file__).parents[1].joinpath(name).read_text("utf-8") for name in advisor.FILES}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return importlib.import_module("advisor.launch.train")


@pytest.fixture(scope="module")
def data() -> ModuleType:
    return importlib.import_module("advisor.launch.train_data")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """train.py and what it imports alone in a folder, as a user has them."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "train.py"


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return write_config(tmp_path, {"model_type": "bert", "vocab_size": 256, "max_position_embeddings": 64, **sizes})


@pytest.fixture
def tiny_t5(tmp_path: Path) -> Path:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return write_config(tmp_path, {"model_type": "t5", "vocab_size": 256, "decoder_start_token_id": 0, **sizes})


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def write_tokenizer(folder: Path) -> None:
    """Ten words and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<eos>", "<unk>", "a", "b", "c", "d", "e", "f", "g", "h"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def run(copy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(copy), "--sequence-length=32", "--micro-batch=2", *arguments],
        cwd=copy.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def losses(log: Path) -> list[float]:
    return [record["loss"] for record in map(json.loads, log.read_text().splitlines()) if "step" in record]


def arguments(**given: Any) -> Namespace:
    defaults = {"objective": "causal", "seed": 0, "micro_batch": 2, "sequence_length": 4, "accumulation_steps": 2}
    defaults |= {"padded": False}
    return Namespace(**defaults | given)


def rank(index: int, processes: int = 2) -> SimpleNamespace:
    return SimpleNamespace(process_index=index, num_processes=processes, device="cpu", parallelism_config=None)


@pytest.mark.parametrize("name", FILES)
def test_it_needs_nothing_of_advisor(name: str) -> None:
    tree = ast.parse(FILES[name])
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert not [name for name in imported if name.split(".")[0] == "advisor"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_three_steps_from_random_weights_end_in_a_finite_loss_and_a_saved_model(
    precision: str, copy: Path, tmp_path: Path
) -> None:
    config = write_tiny_qwen2(tmp_path / "model")

    result = run(
        copy,
        f"--model={config}",
        "--random-weights",
        "--steps=3",
        "--accumulation-steps=2",
        "--checkpointing=full",
        "--log=log.jsonl",
        "--output=saved",
        ACCELERATE_MIXED_PRECISION=precision,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    assert len(losses(tmp_path / "log.jsonl")) == 3
    assert losses(tmp_path / "log.jsonl") == pytest.approx([5.545] * 3, abs=0.1)  # ln 256
    assert "step 3  loss 5." in result.stdout
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_pieces_is_the_same_loss_with_the_same_gradients(program: ModuleType, tied: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("qwen2", vocab_size=256, tie_word_embeddings=tied, **sizes)
    config.num_key_value_heads = 2
    tokens = torch.randint(256, (3, 700), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(tokens < 32, program.IGNORED)
    found = []
    for chunked in (False, True):
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if chunked:
            program.chunk_loss(model)
        outputs = model(input_ids=tokens, labels=labels)
        outputs.loss.backward()
        found.append((outputs.loss, [each.grad for each in model.parameters()]))
    (whole, whole_gradients), (pieced, pieced_gradients) = found

    torch.testing.assert_close(pieced, whole)
    torch.testing.assert_close(pieced_gradients, whole_gradients)


def test_a_loss_in_pieces_refuses_logits_that_are_more_than_a_product(program: ModuleType) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("gemma2", vocab_size=64, head_dim=8, num_key_value_heads=2, **sizes)

    with pytest.raises(SystemExit, match="final_logit_softcapping of Gemma2ForCausalLM is not known to --loss chunked"):
        program.chunk_loss(transformers.AutoModelForCausalLM.from_config(config))


def test_the_fused_loss_says_what_it_needs(copy: Path, tmp_path: Path) -> None:
    config = write_tiny_qwen2(tmp_path / "model")

    # A package of this name that fails to import stands for one that is not installed.
    (tmp_path / "liger_kernel.py").write_text("raise ImportError")
    result = run(copy, f"--model={config}", "--random-weights", "--loss=fused")

    assert result.returncode == 1
    assert "--loss fused needs Liger's kernels: pip install liger-kernel" in result.stderr


def test_a_loss_in_pieces_is_for_causal_models(copy: Path, tiny_bert: Path) -> None:
    result = run(copy, f"--model={tiny_bert}", "--random-weights", "--objective=masked", "--loss=chunked")

    assert result.returncode == 2
    assert "--loss chunked is for causal models: take --loss full" in result.stderr


def test_it_learns_a_text_by_heart(copy: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(write_tiny_qwen2(tmp_path / "model"))
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    line = json.dumps({"text": "a b c d e f g h"})
    (tmp_path / "text.jsonl").write_text("\n".join([line] * 64))

    result = run(copy, "--model=model", "--dataset=text.jsonl", "--steps=60", "--learning-rate=3e-2", "--log=log.jsonl")

    assert result.returncode == 0, result.stderr[-2000:]
    first, *_, last = losses(tmp_path / "log.jsonl")
    assert first > 5
    assert last < 0.5


@pytest.mark.parametrize(("objective", "model"), [("masked", "tiny_bert"), ("seq2seq", "tiny_t5")])
def test_other_objectives_train_too(
    objective: str, model: str, copy: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(model)

    result = run(
        copy, f"--model={config}", "--random-weights", f"--objective={objective}", "--steps=2", "--log=log.jsonl"
    )

    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "log.jsonl") == pytest.approx([5.8] * 2, abs=0.5)


def test_a_configuration_alone_is_refused_unless_weights_may_be_random(copy: Path, tmp_path: Path) -> None:
    config = write_tiny_qwen2(tmp_path / "model")

    result = run(copy, f"--model={config}")

    assert result.returncode == 2
    assert "holds no weights: add --random-weights" in result.stderr


def test_a_dataset_that_is_no_file_is_looked_for_on_the_hub(copy: Path, tmp_path: Path) -> None:
    config = write_tiny_qwen2(tmp_path / "model")
    write_tokenizer(tmp_path / "model")

    # A package of this name that fails to import stands for one that is not installed.
    (tmp_path / "datasets.py").write_text("raise ImportError")
    result = run(copy, f"--model={config}", "--random-weights", "--dataset=some/dataset")

    assert result.returncode == 1
    assert "there is no file some/dataset; to look for it on the Hub: pip install datasets" in result.stderr


def test_a_checkpoint_that_lacks_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(write_tiny_qwen2(tmp_path / "model"))
    built = transformers.AutoModelForCausalLM.from_config(config)
    kept = {name: value for name, value in built.state_dict().items() if "q_proj" not in name}
    built.save_pretrained(tmp_path / "model", state_dict=kept)

    result = run(copy, "--model=model", "--steps=1")

    assert result.returncode == 1
    assert "model lacks 4 weights of Qwen2ForCausalLM, first model.layers.0.self_attn.q_proj.bias" in result.stderr


def test_only_the_text_part_of_a_model_that_also_sees_is_trained_and_saved(copy: Path, tmp_path: Path) -> None:
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "model")

    result = run(copy, "--model=model", "--steps=1", "--learning-rate=0", "--output=saved")

    assert result.returncode == 0, result.stderr[-2000:]
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(text).__name__ == "Gemma3ForCausalLM"
    before = whole.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(text.model.layers[1].mlp.up_proj.weight, before)


def test_ranks_share_out_every_sequence_of_a_pass(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(32))))
    asked = arguments(dataset=str(tmp_path / "numbers.txt"))

    streams = [data.text_sequences(rank(index), asked, Numbers()) for index in range(2)]
    one_pass = torch.cat([next(stream) for stream in streams for _ in range(2)])
    second_pass = torch.cat([next(stream) for stream in streams for _ in range(2)])

    assert sorted(one_pass.flatten().tolist()) == list(range(32))
    assert sorted(second_pass.flatten().tolist()) == list(range(32))
    assert not torch.equal(one_pass, second_pass)


def test_too_short_a_dataset_says_how_much_is_missing(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "numbers.txt").write_text("1 2 3 4 5 6 7 8")
    asked = arguments(dataset=str(tmp_path / "numbers.txt"))

    with pytest.raises(SystemExit) as refused:
        next(data.text_sequences(rank(0), asked, Numbers()))

    assert "gives 2 sequences of 4 tokens; one forward pass of 2 processes x 2 needs 4" in str(refused.value)


class Numbers:
    """A tokenizer whose words are their own numbers."""

    eos_token_id = sep_token_id = None
    mask_token_id = unk_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("objective", ["causal", "masked", "seq2seq"])
def test_labels_ask_for_what_the_objective_restores(objective: str, data: ModuleType) -> None:
    asked = arguments(objective=objective, sequence_length=64)

    for batch in itertools.islice(data.make_batches(rank(0), asked, None, 256), 3):
        inputs, labels = batch["input_ids"], batch["labels"]
        assert inputs.shape == labels.shape == (2, 64)
        assert batch.keys() == {"input_ids", "labels"}  # a mask would cost memory, and nothing is padded
        if objective == "causal":
            assert torch.equal(inputs, labels)
        elif objective == "masked":
            asked_for = labels != -100
            assert asked_for.any(dim=1).all()
            assert (inputs[asked_for] == 0).all()
            assert 0.02 < asked_for.float().mean() < 0.5
        else:
            kept = inputs != 0
            assert torch.equal(inputs[kept], labels[kept])
            assert (labels != -100).all()


def mesh(sp: int = 1, cp: int = 1) -> SimpleNamespace:
    return SimpleNamespace(sp_size=sp, cp_size=cp, sp_enabled=sp > 1, cp_enabled=cp > 1, non_data_parallel_size=sp * cp)


def shared(index: int, processes: int, **sizes: int) -> SimpleNamespace:
    """One of several processes that share sequences."""
    return SimpleNamespace(process_index=index, num_processes=processes, device="cpu", parallelism_config=mesh(**sizes))


def test_processes_that_share_sequences_by_ulysses_have_their_parts(data: ModuleType) -> None:
    asked = arguments(sequence_length=8)
    whole = [next(data.make_batches(rank(index), asked, None, 256))["input_ids"] for index in range(2)]
    parts = [next(data.make_batches(shared(index, 4, sp=2), asked, None, 256)) for index in range(4)]

    for group in range(2):
        first, second = parts[2 * group : 2 * group + 2]
        assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]], dim=1), whole[group])
        # The label of a part's last token is the first token of the next; of the last token of all there is none.
        assert torch.equal(first["labels"], whole[group][:, 1:5])
        assert torch.equal(second["labels"][:, :-1], whole[group][:, 5:])
        assert (second["labels"][:, -1] == -100).all()
        assert first["labels"] is first["shift_labels"]
        assert [each["position_ids"][1].tolist() for each in (first, second)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_context_parallel_processes_get_whole_sequences_which_torch_cuts(data: ModuleType) -> None:
    asked, seen = arguments(sequence_length=8), {}
    one = shared(1, 4, cp=4)
    batch = next(data.make_batches(one, asked, None, 256))
    one.maybe_context_parallel = lambda **words: seen.update(words) or nullcontext()

    with data.whole_attention(one, batch):
        assert torch.equal(batch["input_ids"], next(data.make_batches(rank(0), asked, None, 256))["input_ids"])
    assert [id(each) for each in seen["buffers"]] == [
        id(batch[name]) for name in ("input_ids", "shift_labels", "position_ids")
    ]
    assert (seen["buffer_seq_dims"], len(seen["no_restore_buffers"])) == ([1, 1, 1], 3)
    with data.whole_attention(rank(0), batch) as untouched:
        assert untouched is None


def test_padding_is_hidden_from_attention_and_from_the_loss(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "1 2 3"}\n{"text": "4 5 6 7 8"}\n{"text": "9"}\n')
    asked = arguments(dataset=str(tmp_path / "texts.jsonl"), padded=True, micro_batch=4)

    batch = next(data.make_batches(rank(0, 1), asked, Numbers(), 256))

    seen = batch["attention_mask"].bool()
    assert sorted(batch["input_ids"][seen].tolist()) == list(range(1, 10))
    assert sorted(seen.sum(dim=1).tolist()) == [1, 1, 3, 4]
    assert (batch["labels"][~seen] == -100).all()
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])


def test_random_tokens_differ_between_ranks_but_not_between_runs(data: ModuleType) -> None:
    first, again, other = (next(data.random_sequences(rank(index), arguments(), 256)) for index in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_that_deepspeeds_file_contradicts_is_refused(program: ModuleType) -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}
    accelerator = SimpleNamespace(
        distributed_type=program.DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(deepspeed_config=config)
    )

    program.refuse_other_batch_than_deepspeeds(accelerator, arguments(accumulation_steps=8))
    with pytest.raises(SystemExit) as refused:
        program.refuse_other_batch_than_deepspeeds(accelerator, arguments(accumulation_steps=4))

    assert str(refused.value) == (
        "ds_config.json has gradient_accumulation_steps 8, the arguments say 4: change one of them"
    )


@pytest.mark.parametrize("words", [("--save-every=3",), ("--resume=auto",)])
def test_checkpoints_need_a_folder(
    words: tuple[str, ...], program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--model=tiny", *words])

    with pytest.raises(SystemExit):
        program.parse_arguments()


PREDICTION = {
    "predicted_for": "2 x Test-80GB",
    "processes": 2,
    "micro_batch": 2,
    "accumulation_steps": 2,
    "sequence_length": 4,
    "tokens_per_s": 1500,
    "mfu": 0.5,
    "peak_allocated_bytes": 2**30,
    "peak_reserved_bytes": 2**31,
}


def test_each_step_stands_beside_what_was_predicted(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 3, "loss": 1.5, "tokens_per_s": 1234.4, "mfu": 0.4125, "peak_allocated_bytes": 3 * 2**29}

    program.report(SimpleNamespace(is_main_process=True), None, record, PREDICTION)
    program.report(SimpleNamespace(is_main_process=True), None, record)

    assert capsys.readouterr().out.splitlines() == [
        "step 3  loss 1.5000  1,234 (1,500) tokens/s  MFU 41.2 (50.0) %  peak allocated 1.50 (1.00) GiB",
        "step 3  loss 1.5000  1,234 tokens/s  MFU 41.2 %  peak allocated 1.50 GiB",
    ]


def test_a_prediction_for_another_batch_is_left_aside(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "__file__", str(tmp_path / "train.py"))

    assert program.read_prediction(rank(0), arguments()) == {}
    (tmp_path / "prediction.json").write_text(json.dumps(PREDICTION))
    assert program.read_prediction(rank(0), arguments()) == PREDICTION
    assert program.read_prediction(rank(0), arguments(micro_batch=4)) == {}
    assert program.read_prediction(rank(0, processes=4), arguments()) == {}
