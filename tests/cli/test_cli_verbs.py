"""What each verb asks of the API and prints; training itself is tested where it lives."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from onecard.cli.rows import format_rows
from onecard.errors import DivergedError
from onecard.observe import EvaluatedEvent
from onecard.spec.mask_audit import MaskAudit, RowLengths, SampleRow, SourceFormats

AUDIT = MaskAudit(
    template="chatml",
    formats=(SourceFormats(path="a.jsonl", formats=("messages",)),),
    num_rows=20,
    num_tokens=1000,
    num_target_tokens=400,
    num_heldout_rows=0,
    num_heldout_target_tokens=0,
    lengths=RowLengths(median=50, percentile_95=80, longest=90),
    samples=(SampleRow(origin="a.jsonl:1", spans=(("User: Hi\nAssistant:", False), (" Hello", True))),),
)


def test_train_passes_recipe_and_folder_on(run, api) -> None:
    done = run("train", "demo", "--output_dir", "here", "--learning-rate", "4e-5", "--fp16", "--max_steps=7")
    assert done.code == 0
    ((verb, asked),) = api.calls
    assert verb == "train"
    assert (asked["output_dir"], asked["resume"]) == (Path("here"), None)
    recipe = asked["recipe"]
    assert (recipe.name, recipe.learning_rate, recipe.max_steps, recipe.precision) == ("demo", 4e-5, 7, "fp16")


def test_train_tells_the_story_of_a_run(run, api) -> None:
    lines = run("train", "--dataset", "a.txt").stdout.splitlines()
    assert lines[0] == "tokenizing ..."
    assert lines[1] == "device      cpu, fp32, not compiled"
    assert lines[2] == "model       qwen3, 5.50M parameters, 6 layers, width 256"
    assert lines[3] == "batch       32 sequences of 256 tokens = 8.19K per step, in 2 micro-batches of 16"
    assert lines[4].startswith("steps       40 = 327.7K tokens, 0.5 epochs, evaluation every 20, samples every 20")
    assert lines[7] == f"run folder  {api.run_folder}"
    # logging_steps is 20 in the recipe of the run folder.
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/40", "20/40", "40/40"]
    assert "completed: 40 steps" in lines[-5]
    assert lines[-2].endswith(f'onecard generate {api.run_folder} --prompt "..."')
    assert lines[-1].endswith(f"tensorboard --logdir {api.run_folder}")


def test_train_on_chats_ends_on_the_command_to_talk(run, api) -> None:
    (api.run_folder / "audit.json").write_text(AUDIT.model_dump_json(), encoding="utf-8")
    assert f"onecard chat {api.run_folder}\n" in run("train", "--dataset", "a.txt").stdout


def test_train_shows_its_whole_plan_and_what_came_of_it(run, api, plan, forecast) -> None:
    api.plan_made = plan.model_copy(update={"device": "cuda:0", "forecast": forecast})
    evaluated = {"step": 20, "elapsed_s": 3.0, "loss": 1.9, "bits_per_byte": None, "standard_error": 0.1}
    api.heard = [
        EvaluatedEvent(**evaluated, num_target_tokens=9, is_best=True, seconds=seconds) for seconds in (4.0, 6.0)
    ]
    lines = run("train", "--dataset", "a.txt").stdout.splitlines()
    begins = lines[: next(number for number, line in enumerate(lines) if line.startswith("step "))]
    told = {line[:12].strip(): line[12:] for line in begins if not line.startswith("  ")}
    assert told["memory"].startswith("fits: 100.0 MiB (97.0 MiB to 104.0 MiB) of 10.0 GiB")
    assert told["whole run"] == "0:10, 0.1 to 0.2 kWh; 0.1 tokens per parameter"
    assert told["of it"] == "2 evaluations of 2.5 s, 1 checkpoint of 1 s"
    assert told["choices"].endswith(f"onecard plan --explain {api.run_folder}")
    assert [line.split()[0] for line in begins if "█" in line] == ["activations", "weights", "other", "free"]
    place = next(number for number, line in enumerate(lines) if line.startswith("as planned?"))
    assert [line[13:] for line in lines[place : place + 2]] == [
        "evaluation 5 s, predicted 2.5 (+100%)",
        "whole run 0:04, predicted 0:10 (-60%)",
    ]
    api.finished = replace(api.finished, step=17, reason="stopped early")
    assert "whole run 0:" not in run("train", "--dataset", "a.txt").stdout


def test_train_as_json_prints_one_document_and_nothing_else(run, api) -> None:
    done = run("train", "--dataset", "a.txt", "--json")
    document = json.loads(done.stdout)
    assert document["run"] == str(api.run_folder)
    assert (document["reason"], document["loss"], document["best_step"]) == ("completed", 1.8, 20)
    assert "step 20/40" in done.stderr


def test_a_loss_that_is_no_number_is_still_json(run, api) -> None:
    api.finished = replace(api.finished, loss=float("nan"))
    assert json.loads(run("train", "--dataset", "a.txt", "--json").stdout)["loss"] is None


def test_the_recipe_may_be_a_file_by_option(run, api, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("dataset: a.txt\nmax_steps: 5\n", encoding="utf-8")
    run("train", "--config", "mine.yaml")
    assert api.calls[0][1]["recipe"].max_steps == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a recipe, for example: onecard train demo"),
        (["demo", "small-pretrain"], "one recipe at a time, but there are 2: demo, small-pretrain"),
        (["demo", "--config", "mine.yaml"], "one recipe at a time"),
        (["demo", "--learing-rate", "1", "--max_stepps", "2"], "2 problems"),
    ],
)
def test_bad_words_are_exit_code_2(run, api, words: list[str], message: str) -> None:
    done = run("train", *words)
    assert (done.code, api.calls) == (2, [])
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["plan", "prepare"])
def test_a_verb_without_a_recipe_is_told_of_itself(run, api, verb: str) -> None:
    done = run(verb)
    assert (done.code, api.calls) == (2, [])
    assert f"name a recipe, for example: onecard {verb} demo" in done.stderr


@pytest.mark.parametrize("word", ["--resume", "--resume_from_checkpoint", "--resume-from-checkpoint"])
def test_resume_needs_no_recipe(run, api, word: str) -> None:
    assert run("train", word, "runs/demo-1").code == 0
    assert api.calls == [("resume", {"run": "runs/demo-1"})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "demo", "--fp16", "maybe"], "--fp16 maybe: takes true or false, and there is no recipe named maybe"),
        (["plan", "--torch-compile", "maybe"], "--torch-compile maybe: takes true, false or auto"),
        (["plan", "--resume", "x"], "--resume is for train alone"),
    ],
)
def test_a_word_after_a_switch_is_understood(run, api, words: list[str], message: str) -> None:
    done = run(*words)
    assert (done.code, message in done.stderr) == (2, True), done.stderr


def test_resume_with_a_recipe_is_passed_on(run, api) -> None:
    run("train", "demo", "--resume", "True")
    assert api.calls[0][1]["resume"] == "latest"


def test_the_verb_resume_does_the_same(run, api) -> None:
    assert run("resume", "latest").code == 0
    assert api.calls == [("resume", {"run": "latest"})]


def test_an_interrupted_run_says_how_to_go_on(run, api) -> None:
    api.finished = replace(api.finished, step=17, reason="interrupted")
    done = run("train", "--dataset", "a.txt")
    assert done.code == 130
    assert done.stderr.startswith("stopped; resume with: ")
    assert done.stderr.endswith(f"onecard resume {api.run_folder}\n")


def test_a_second_interrupt_says_so_too(run, api) -> None:
    api.raises = KeyboardInterrupt()
    done = run("train", "--dataset", "a.txt")
    assert done.code == 130
    assert f"onecard resume {api.run_folder}" in done.stderr


def test_a_run_that_diverged_is_exit_code_4(run, api) -> None:
    api.raises = DivergedError("the loss is not finite")
    done = run("train", "--dataset", "a.txt")
    assert (done.code, done.stderr.splitlines()[-1]) == (4, "the loss is not finite")


def test_a_folder_with_spaces_is_quoted(run, api) -> None:
    api.run_folder = api.run_folder.rename(api.run_folder.parent / "my run")
    assert f'generate "{api.run_folder}" --prompt' in run("train", "--dataset", "a.txt").stdout


def test_plan_shows_decisions_with_reasons(run, api) -> None:
    lines = run("plan", "--dataset", "a.txt").stdout.splitlines()
    assert "decision            value  reason" in lines
    assert "micro_batch_size    16     half of the batch is fastest on two cores" in lines
    assert "schedule.num_steps  40     of the recipe" in lines


def test_plan_as_json_is_the_plan(run, api, plan) -> None:
    document = json.loads(run("plan", "--dataset", "a.txt", "--json").stdout)
    assert document["settings"]["micro_batch_size"] == plan.micro_batch_size
    assert document["choices"] == plan.reasons
    # A CPU has no forecast, but the keys are always there.
    assert (document["card"], document["fits"], document["step_s"], document["alternatives"]) == (None, None, None, [])


def test_prepare_says_what_is_where(run, api) -> None:
    assert run("prepare", "--dataset", "a.txt").stdout.splitlines() == [
        "tokenizer  vocabulary 4096",
        f"           {Path('cache/tokenizer')}",
        "to train   1.00K tokens from 2.9 KiB, 3.00 bytes per token",
        f"           {Path('cache/train.bin')}",
        "held out   nothing",
    ]
    facts = json.loads(run("prepare", "--dataset", "a.txt", "--json").stdout)
    assert (facts["num_train_tokens"], facts["heldout_files"]) == (1000, [])


def test_prepare_tells_of_chats_what_counts_in_aligned_columns(run, api) -> None:
    api.audit = AUDIT
    shown = run("prepare", "--dataset", "a.jsonl").stdout
    assert "to train   1.00K tokens, 400 of them to learn" in shown
    assert "chats      20 conversations to train on" in shown
    assert "Assistant:« Hello»" in shown
    facts = json.loads(run("prepare", "--dataset", "a.jsonl", "--json").stdout)
    assert facts["audit"]["num_target_tokens"] == 400


def test_train_tells_of_chats_what_counts_before_the_first_step(run, api) -> None:
    (api.run_folder / "audit.json").write_text(AUDIT.model_dump_json(), encoding="utf-8")
    lines = run("train", "demo").stdout.splitlines()
    starts = [line.split("  ")[0] for line in lines]
    assert starts.index("data") < starts.index("chats") < starts.index("run folder") < lines.index("Assistant:« Hello»")
    assert lines[lines.index("Assistant:« Hello»") + 1] == ""


def test_generate_asks_for_all_prompts_at_once(run, api) -> None:
    done = run("generate", "r", "--prompt", "ab", "--prompt", "cd", "--temperature", "0", "--top_k", "5", "--seed", "3")
    assert done.stdout == "abba!\n---\ncddc!\n"
    ((_, asked),) = api.calls
    assert asked == {
        "model": "r",
        "prompts": ["ab", "cd"],
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_k": 5,
        "top_p": None,
        "seed": 3,
        "checkpoint": "best",
        "device": "auto",
        "chat": False,
    }


def test_generate_answers_with_a_model_that_chats_unless_told_otherwise(run, api) -> None:
    assert run("generate", "chatty", "--prompt", "ab").stdout == "ab\nba!\n"
    assert run("generate", "chatty", "--prompt", "ab", "--plain").stdout == "abba!\n"
    assert run("generate", "r", "--prompt", "ab", "--chat").stdout == "ab\nba!\n"
    assert [asked["chat"] for _, asked in api.calls] == [True, False, True]


def test_generate_as_json(run, api) -> None:
    done = run("generate", "r", "--prompt", "你好", "--json")
    assert json.loads(done.stdout) == [{"prompt": "你好", "completion": "好你!"}]


def test_generate_reads_prompts_from_a_file_and_from_stdin(run, api, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8-sig")
    run("generate", "r", "--prompt", "zero", "--prompt_file", "prompts.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"three\nfour\n")))
    run("generate", "r")
    assert [asked["prompts"] for _, asked in api.calls] == [["zero", "one", "two"], ["three", "four"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-file", "missing.txt"], "missing.txt: cannot be read"),
        (["--prompt-file", "latin.txt"], "latin.txt: byte 3 is not UTF-8"),
    ],
)
def test_generate_refuses_prompt_files_it_cannot_read(run, api, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    done = run("generate", "r", "--prompt", "a", *words)
    assert (done.code, api.calls) == (2, [])
    assert message in done.stderr


def test_generate_refuses_input_that_is_no_text(run, api, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    done = run("generate", "r")
    assert (done.code, api.calls) == (2, [])
    assert "standard input: byte 3 is not UTF-8" in done.stderr


def test_generate_without_a_prompt_says_how_to_give_one(run, api, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    done = run("generate", "r")
    assert done.code == 2
    assert "--prompt-file FILE" in done.stderr


def test_recipes_lists_and_shows_them(run) -> None:
    listed = run("recipes").stdout
    assert [line.split()[0] for line in listed.splitlines()] == sorted(line.split()[0] for line in listed.splitlines())
    assert "demo " in listed
    assert "dataset: python-stdlib" in run("recipes", "demo").stdout


def test_recipes_suggests_a_name(run) -> None:
    done = run("recipes", "shakespear-char")
    assert done.code == 2
    assert "did you mean shakespeare-char" in done.stderr


def test_recipes_explains_every_key(run) -> None:
    text = run("recipes", "--keys").stdout
    assert "learning_rate: a number above 0; default 0.006\n    AdamW's learning rate; of an existing" in text
    assert "of adapters 2e-4 (also: lr)\n" in text
    assert "fp16" in text


def test_rows_wrap_within_their_last_column() -> None:
    rows = [("a", "one two three four five"), ("long", "six")]
    assert format_rows(rows, 26) == ["a     one two three four", "      five", "long  six"]
    assert format_rows(rows, None) == ["a     one two three four five", "long  six"]
    # No room beside the first column: below it; not even room for that: whole.
    assert format_rows(rows, 15) == ["a", "    one two", "    three four", "    five", "long", "    six"]
    assert format_rows(rows, 5) == format_rows(rows, None)
