from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from advisor.cli.main import COMMANDS, EXAMPLES, SYNONYMS, Cli, cli, own_word
from advisor.version import __version__
from cli.conftest import Api, Run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from advisor.cli.main import main; main()"


def whole_process(*words: str, program: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess[str]:
    """``advisor`` as its users start it, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def command(name: str) -> click.Command:
    assert isinstance(cli, Cli)
    found = cli.get_command(click.Context(cli), name)
    assert found
    return found


def test_help_starts_with_three_examples(run: Run) -> None:
    lines = run("--help").stdout.splitlines()

    assert lines[3:6] == [f"  {example}" for example in EXAMPLES]
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_name_commands_and_flags_that_exist(example: str) -> None:
    program, name, *words = example.split()

    assert program == "advisor"
    command(name).make_context(name, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_introduced_by_the_first_sentence_of_its_help(name: str) -> None:
    assert (command(name).help or "").splitlines()[0] == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_an_example_that_it_accepts(run: Run, name: str) -> None:
    text = run(name, "--help").stdout
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"    advisor {name}")]

    assert run(name, "--help").exit_code == 0
    assert examples
    for example in examples:
        command(name).make_context(name, example.partition(" > ")[0].split()[2:], parent=click.Context(cli))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    options = [each for each in command(name).params if isinstance(each, click.Option)]

    assert [each.name for each in options if not each.help] == []


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_page(run: Run, name: str, columns: int) -> None:
    assert max(map(len, run(name, "--help", columns=columns).stdout.splitlines())) <= columns


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--seq_len", "seq_len"),
        ("--max_seq_length", "seq_len"),
        ("--cutoff_len", "seq_len"),
        ("--per_device_train_batch_size", "micro_batch"),
        ("--gradient_accumulation_steps", "grad_accum"),
        ("--num_processes", "gpus"),
        ("--train_batch_size", "global_batch"),
    ],
)
def test_flags_of_trainers_are_understood(api: Api, run: Run, typed: str, meant: str) -> None:
    result = run("estimate", "--model", "gpt2", "--strategy", "ddp", typed, "8")

    assert result.exit_code == 0
    assert api.asked[0][meant] == 8


def test_values_of_trainers_are_understood(api: Api, run: Run) -> None:
    run("recommend", "--model", "gpt2", "--optim", "adamw_torch_fused", "--attn_implementation", "flash_attention_2")

    assert (api.asked[0]["optimizer"], api.asked[0]["attention"]) == ("adamw-fused", "flash")


@pytest.mark.parametrize("name", ["recommend", "estimate"])
def test_words_of_trainers_are_not_shown(run: Run, name: str) -> None:
    text = run(name, "--help").stdout

    assert "_" not in text.replace("_ADVISOR", "")
    assert "per-device" not in text


def test_every_synonym_stands_for_a_flag_or_a_choice() -> None:
    known = set()
    for each in (*command("recommend").params, *command("estimate").params):
        known |= {name.removeprefix("--") for name in each.opts}
        if isinstance(each.type, click.Choice):
            known |= set(each.type.choices)

    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known
    assert own_word("max_seq_length") == own_word("seq-len") == "seq-len"


def test_unknown_flags_and_commands_are_wrong_usage(run: Run) -> None:
    for words in (("recommend", "--modell", "gpt2"), ("recomend",), ("recommend", "--model", "gpt2", "--gpus", "four")):
        result = run(*words)

        assert (result.exit_code, result.stdout) == (2, "")
        assert "Error: " in result.stderr


def test_help_loads_neither_numpy_nor_rich_nor_pandas() -> None:
    program = """
import sys
from advisor.cli.main import main
try:
    main()
finally:
    print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""

    loaded = set(whole_process("--help", program=program).stderr.split())

    assert "click" in loaded
    assert not loaded & {"numpy", "rich", "pandas", "torch", "transformers", "yaml", "huggingface_hub"}


def test_a_stream_that_holds_only_ascii_gets_plain_characters() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import advisor.search.recommend
from report.samples import made_recommendation
advisor.search.recommend.recommend = lambda **words: made_recommendation()
{PROGRAM}
"""
    result = whole_process(
        "recommend", "--model", "gpt2", program=program, PYTHONIOENCODING="ascii", COLUMNS="80", NO_COLOR="1"
    )

    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert result.stdout.isascii()
    assert "?" not in result.stdout
    assert "---------" in result.stdout
    assert "49-54" in result.stdout


def test_a_pipe_that_closes_early_ends_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "gpus"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""


def test_an_interrupted_process_says_so_in_one_line() -> None:
    program = f"""
import signal
import advisor.search.recommend
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
advisor.search.recommend.recommend = lambda **words: signal.raise_signal(signal.SIGINT)
{PROGRAM}
"""
    result = whole_process("recommend", "--model", "gpt2", program=program)

    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Error: interrupted\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_asks_advisor(run: Run, shell: str) -> None:
    result = run("completion", shell)

    assert result.exit_code == 0
    assert f"_ADVISOR_COMPLETE={shell}_complete" in result.stdout


def test_the_completion_script_finds_commands_models_and_gpus() -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        result = whole_process(_ADVISOR_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
        return [answer.partition(",")[2] for answer in result.stdout.splitlines()]

    assert completed("advisor reco") == ["recommend", "records"]
    assert "A100-80GB" in completed("advisor recommend --gpu a100")
    assert "Qwen2.5-1.5B" in completed("advisor recommend --model qwen2.5")


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version").stdout == f"advisor {__version__}\n"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("estimate", "--model", "gpt2", "--strategy", "zero9"), "'zero9' is not one of"),
        (("recommend",), "Missing option '--model'"),
        (("recomend",), "No such command 'recomend'"),
        (("--bogus",), "No such option '--bogus'"),
    ],
)
def test_wrong_usage_is_told_in_one_line_with_where_to_read_on(run: Run, words: tuple[str, ...], what: str) -> None:
    result = run(*words)

    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert what in result.stderr
    assert "--help`" in result.stderr
