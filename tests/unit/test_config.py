"""Loading: strict types, overrides, one message for all problems, and the way back to TOML."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_srpo.algorithms.section import BY_NAME, DEFAULT, known_fields
from megatron_srpo.config import Config, load_config, nearest_key, save_resolved, to_toml
from megatron_srpo.config.load import OTHER_NAMES, config_fields, to_toml_value
from megatron_srpo.config.reference import defaults, markdown
from megatron_srpo.core.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = '[model]\npath = "m"\n[data]\ntrain = "t.jsonl"\n'


@pytest.fixture
def minimal(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    return file


def message(file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def load_text(tmp_path, text, overrides=()):
    file = tmp_path / "run.toml"
    file.write_text(text)
    return load_config(file, overrides)


def test_a_minimal_file_gets_the_defaults(minimal):
    config = load_config(minimal)
    assert config.model.path == "m"
    assert (config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt) == (32, 8)
    assert config.algorithm.beta == 1.0


def test_the_defaults_do_not_contradict_each_other(minimal):
    from megatron_srpo.config import check

    check(load_config(minimal), None, 1)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["--optimizer.lr", "5e-6"], "optimizer.lr", 5e-6),
        (["--optimizer.lr=1"], "optimizer.lr", 1.0),
        (["--run.iterations", "3"], "run.iterations", 3),
        (["--run.iterations", "3", "--run.iterations", "4"], "run.iterations", 4),
        (["--algorithm.entropy_beta", "-1"], "algorithm.entropy_beta", -1.0),
        (["--parallel.sequence_parallel", "true"], "parallel.sequence_parallel", True),
        (["--algorithm.name", "grpo"], "algorithm.name", "grpo"),
        (["--algorithm.name", '"grpo"'], "algorithm.name", "grpo"),
        (["--run.name", "17"], "run.name", "17"),
        (["--run.name", "true"], "run.name", "true"),
        (["--run.name", '["a"]'], "run.name", '["a"]'),
        (["--run.name=--x = 3"], "run.name", "--x = 3"),
        (["--run.name", "1\n[model]"], "run.name", "1\n[model]"),
        (["--run.output_dir", "a folder/with = signs"], "run.output_dir", "a folder/with = signs"),
        (["--data.train", "x.jsonl"], "data.train", "x.jsonl"),
        (["--data.train", '["x.jsonl", "y.jsonl"]'], "data.train", ["x.jsonl", "y.jsonl"]),
        (["--data.chat_template_kwargs.think", "false"], "data.chat_template_kwargs", {"think": False}),
        (["--data.chat_template_kwargs", "{ a = { b = 1 } }"], "data.chat_template_kwargs", {"a": {"b": 1}}),
        (["--reward.functions.mine", "my/file.py:score"], "reward.functions", {"mine": "my/file.py:score"}),
    ],
)  # fmt: skip
def test_an_override_is_read_as_its_key_wants_it(minimal, overrides, key, value):
    section, leaf = key.split(".")
    got = getattr(getattr(load_config(minimal, overrides), section), leaf)
    assert got == value and type(got) is type(value)


def test_an_override_wins_over_the_file_and_leaves_its_neighbours(tmp_path):
    config = load_text(tmp_path, MINIMAL + "[optimizer]\nlr = 1.0\neps = 0.5\n", ["--optimizer.lr", "2.0"])
    assert (config.optimizer.lr, config.optimizer.eps) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--optimizer.lr=fast", 'optimizer.lr = "fast": expected a number > 0'),
        ("--optimizer.lr=nan", "optimizer.lr = nan: expected a number > 0"),
        ("--optimizer.lr=true", "optimizer.lr = true: expected a number > 0"),
        ("--run.iterations=1.5", "run.iterations = 1.5: expected a whole number ≥ 1"),
        ("--run.iterations=3.0", "run.iterations = 3.0: expected a whole number ≥ 1"),
        ("--run.iterations=0", "run.iterations = 0: expected a whole number ≥ 1"),
        ("--parallel.sequence_parallel=yes", 'parallel.sequence_parallel = "yes": expected true or false'),
        ("--parallel.sequence_parallel=1", "parallel.sequence_parallel = 1: expected true or false"),
        ("--model.dtype=float16", 'model.dtype = "float16": expected one of "float32", "bfloat16"'),
        ("--rollout.top_p=1.5", "rollout.top_p = 1.5: expected a number > 0 and ≤ 1"),
        ("--data.train=[1]", "data.train = [1]: expected a string or a list of strings"),
        ("--rollout.server_devices=[x]", 'rollout.server_devices = "[x]": expected a list of whole numbers'),
        ("--reward.functions.mine=3", "reward.functions = { mine = 3 }: expected a table of strings"),
        ("--reward.functions=x", 'reward.functions = "x": expected a table of strings'),
        ("--algorithm.dual_clip=0.5", "algorithm.dual_clip = 0.5: expected a number > 1"),
        ("--algorithm.entropy_beta=-0.5", "algorithm.entropy_beta = -0.5: expected a number ≥ 0, or -1"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(minimal, override, expected):
    assert expected in message(minimal, [override])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("rollout.n_samples", "rollout.n_samples_per_prompt"),  # the beginning of one key
        ("optimizer.warmup_step", "optimizer.warmup_steps"),
        ("rollout.temprature", "rollout.temperature"),
        ("train.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("teacher_update_rate", "teacher.update_rate"),
        ("run.output-dir", "run.output_dir"),
        ("actor.clip_ratio_high", "algorithm.clip_ratio_high"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("train.learning_rat", "optimizer.lr"),
        ("num_generations", "rollout.n_samples_per_prompt"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_one(key, nearest):
    assert nearest_key(key) == nearest


def names_of_other_projects():
    """(their name, ours) of the table in docs/bring-your-own-task.md, where one name stands for one key."""
    text = (ROOT / "docs/bring-your-own-task.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    for row in rows:
        ours, *theirs = ([*re.findall(r"`([^`]*)`", cell)] for cell in row.split("|")[2:-1])
        for names in theirs:
            if len(names) == len(ours) and all(our in config_fields() for our in ours):
                yield from zip(names, ours, strict=True)


def test_every_name_in_the_table_of_other_projects_leads_to_its_key_here():
    pairs = [pair for pair in names_of_other_projects() if pair[0] not in ("model", "prompt", "num_generations")]
    assert len(pairs) > 40
    assert [(name, nearest_key(name.removeprefix("--"))) for name, _ in pairs] == pairs


def test_other_projects_names_lead_to_keys_that_exist_and_hide_none():
    keys = config_fields()
    assert set(OTHER_NAMES.values()) <= set(keys)
    assert not set(OTHER_NAMES) & {key.rpartition(".")[2] for key in keys}


def test_every_problem_is_in_one_message_without_jargon(tmp_path):
    text = "seed = 3\n[optimiser]\nlr = 1\n[rollout]\ntemprature = 1\ntop_p = 7\n[data]\ntest = [1]\n"
    file = tmp_path / "run.toml"
    file.write_text(text)
    told = message(file, ["--train.lr", "3", "--run.seed"])
    for line in (
        '--train.lr "3": no such key; the nearest is optimizer.lr',
        "--run.seed: has no value",
        "[model]: required section is missing; it needs model.path",
        "data.train: required key is missing; expected a string or a list of strings",
        "data.test = [1]: expected a string or a list of strings",
        "rollout.temprature = 1: no such key; the nearest is rollout.temperature",
        "rollout.top_p = 7: expected a number > 0 and ≤ 1",
        "seed = 3: no such key; the nearest is run.seed",
        "[optimiser]: no such section; the nearest is [optimizer]",
    ):
        assert f"\n  {line}" in told
    assert told.startswith(f"{file} + the command line: 9 problems\n") and told.count("\n") == 9
    assert not any(word in told for word in ("pydantic", "http", "Input should", "extra_forbidden"))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--run.seed"], "--run.seed: has no value"),
        (["--run.seed", "--run.name", "x"], "--run.seed: has no value"),
        (["stray"], "'stray': not expected here"),
        (["--rollout", "3"], "--rollout: is a section"),
        (["--run.seed.deep", "3"], "no such key"),
        (["--nothing_like_it_at_all", "3"], "the sections are run, model"),
    ],
)
def test_a_malformed_override_is_told(minimal, tokens, expected):
    assert expected in message(minimal, tokens)


def test_a_plain_value_where_a_section_belongs_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer = 3: expected a section \[optimizer\] with keys such as lr"):
        load_text(tmp_path, "optimizer = 3\n" + MINIMAL, ["--optimizer.lr", "1"])


def test_a_long_value_is_shown_shortened(minimal):
    told = message(minimal, ["--model.dtype", "x" * 500])
    assert len(told) < 300 and "…" in told


def test_a_value_from_the_command_line_is_told_apart_from_the_files(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL + "[optimizer]\nlr = -1\n")
    told = message(file, ["--run.seed", "-1"]).splitlines()
    assert [line.endswith("(from the command line)") for line in told[1:]] == [True, False]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--teacher.refresh_every", "3"], ['"ema" does not use teacher.refresh_every (refresh would): no effect']),
        (
            ["--teacher.mode", "live", "--teacher.update_rate", "0.1", "--teacher.refresh_when", "improved"],
            ['"live" does not use teacher.update_rate, refresh_when (ema, refresh, trust_region would): no effect'],
        ),
        (["--teacher.mode", "trust_region", "--teacher.update_rate", "0.1"], []),
        (["--teacher.mode", "frozen", "--teacher.update_rate", "0.05"], []),
        (["--teacher.mode", "refresh", "--teacher.refresh_every", "3"], []),
        (
            ["--teacher.mode", "refresh", "--teacher.refresh_min_length", "0.5"],
            [
                '"refresh" with refresh_when = "always" does not use teacher.refresh_min_length ("improved" would): no '
                "effect"
            ],
        ),
        (["--algorithm.name", "grpo", "--teacher.refresh_every", "3"], []),
    ],
)
def test_keys_of_another_mode_of_the_teacher_are_told_once(minimal, overrides, expected):
    told = []
    load_config(minimal, overrides, tell=told.append)
    assert told == [f"note: teacher.mode = {text}" for text in expected]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--rollout.num_servers", "2", "--rollout.in_flight", "pause"],
         ['rollout.placement = "colocated" does not use rollout.num_servers, in_flight']),
        (["--rollout.placement", "servers", "--rollout.num_servers", "2"], []),
        (["--rollout.placement", "servers", "--rollout.servers", '["http://a:1"]', "--rollout.server_port", "9000"],
         ["a run with rollout.servers does not use rollout.server_port"]),
        (["--rollout.placement", "servers", "--rollout.sleep_while_training", "true"],
         ['rollout.placement = "servers" does not use rollout.sleep_while_training']),
        (["--rollout.placement", "servers", "--rollout.in_flight", "pause"],
         ["rollout.max_staleness = 0 does not use rollout.in_flight"]),
        (["--rollout.placement", "servers", "--rollout.in_flight", "pause", "--rollout.max_staleness", "1"], []),
        (["--environment.max_turns", "3"], ["a run without environment.classes does not use environment.max_turns"]),
        (["--environment.max_turns", "3", "--environment.classes.math", "tools"], []),
        (["--optimizer.min_lr", "1e-7"], ['optimizer.schedule = "constant" does not use optimizer.min_lr']),
        (["--optimizer.min_lr", "1e-7", "--optimizer.schedule", "cosine"], []),
        (["--optimizer.decay_norms_and_biases", "true"], []),
        (["--optimizer.decay_norms_and_biases", "true", "--lora.rank", "8", "--optimizer.lr", "5e-5"],
         ["a run with adapters (lora.rank), which are matrices, does not use optimizer.decay_norms_and_biases"]),
        (["--teacher.offload", "true"], []),
        (["--teacher.offload", "true", "--teacher.mode", "frozen"], []),
        (["--teacher.offload", "true", "--teacher.mode", "frozen", "--lora.rank", "8", "--optimizer.lr", "5e-5"],
         ["a run without weights of a teacher or a reference beside the student's does not use teacher.offload"]),
        (["--teacher.offload", "true", "--algorithm.name", "grpo"],
         ["a run without weights of a teacher or a reference beside the student's does not use teacher.offload"]),
        (["--teacher.offload", "true", "--algorithm.name", "grpo", "--algorithm.kl_loss_coef", "0.1"], []),
    ],
)  # fmt: skip
def test_settings_of_what_the_run_does_not_have_are_told_once(minimal, overrides, expected):
    told = []
    load_config(minimal, overrides, tell=told.append)
    assert told == [f"note: {text}: no effect" for text in expected]


def test_a_missing_file_names_its_neighbours(minimal):
    told = message(minimal.with_name("rum.toml"))
    assert "rum.toml: no such file" in told and "run.toml" in told


def test_a_folder_in_place_of_a_file_is_told(minimal):
    assert "is a folder" in message(minimal.parent)


def test_a_byte_order_mark_is_read_over(minimal):
    expected = load_config(minimal)
    minimal.write_bytes(b"\xef\xbb\xbf" + minimal.read_bytes())
    assert load_config(minimal) == expected


def test_a_file_that_is_not_text_is_told(minimal):
    minimal.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in message(minimal)


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [("[run]\nname = srpo\n", 2, "name = srpo"), ("[run]\nseed = 1\nseed = 2\n", 3, ""), ('[run]\nname = "x', 2, "")],
)
def test_a_syntax_error_names_the_line(tmp_path, text, line, shown):
    with pytest.raises(ConfigError, match=f"line {line}: not valid TOML") as caught:
        load_text(tmp_path, text)
    assert shown in str(caught.value)


def test_configuration_errors_are_users_errors_and_value_errors():
    assert issubclass(ConfigError, UserError) and issubclass(UserError, ValueError)


def test_a_config_cannot_be_changed(minimal):
    with pytest.raises(ValueError, match="frozen"):
        load_config(minimal).run.seed = 3


# ---- back to TOML ----------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_any_value_survives_the_way_to_toml_and_back(value):
    assert tomllib.loads(f"x = {to_toml_value(value)}")["x"] == value


def test_a_saved_configuration_loads_as_the_same_one(minimal, tmp_path):
    awkward = 'quote " backslash \\ newline \n tab \t bell \x07 delete \x7f ü 数'
    overrides = ["--optimizer.lr=1e-7", f"--teacher.instruction={awkward}", '--data.test=["a b", "c"]']
    overrides += ["--data.chat_template_kwargs", '{ "odd key" = [1, 2.5], deep = { on = true } }']
    config = load_config(minimal, overrides)
    assert config.teacher.instruction == awkward
    saved = tmp_path / "a" / "b" / "config.toml"
    save_resolved(config, saved)
    assert load_config(saved) == config
    assert [file.name for file in saved.parent.iterdir()] == ["config.toml"]


def test_the_saved_configuration_names_every_key(minimal):
    tree = tomllib.loads(to_toml(load_config(minimal)))
    others = {f"algorithm.{key}" for key in known_fields() if key not in BY_NAME[DEFAULT].model_fields}
    assert {f"{section}.{key}" for section, values in tree.items() for key in values} == {*config_fields()} - others


# ---- several files ---------------------------------------------------------------------------------------------------


def write_all(tmp_path, **texts):
    """A file for each text, in order; the first one is complete."""
    files = [tmp_path / f"{name}.toml" for name in texts]
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text)
    return files


def test_keys_of_later_files_win_and_the_command_line_wins_over_all(tmp_path):
    files = write_all(
        tmp_path,
        base=MINIMAL + "kind = 'exact'\nchat_template_kwargs = { a = 1, b = 2 }\n[run]\nseed = 1\niterations = 7\n",
        one="[run]\nseed = 2\n[optimizer]\nlr = 1e-3\n",
        two="[run]\nseed = 3\n[data]\nchat_template_kwargs = { c = 3 }\n",
    )
    config = load_config(files, ["--optimizer.lr", "0.5"])
    assert (config.run.seed, config.run.iterations, config.optimizer.lr, config.data.kind) == (3, 7, 0.5, "exact")
    assert config.data.chat_template_kwargs == {"c": 3}  # the value of one key
    assert load_config([files[0], files[2], files[1]]).run.seed == 2
    save_resolved(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config


def test_a_mistake_names_the_file_in_which_it_stands(tmp_path):
    files = write_all(
        tmp_path,
        base=MINIMAL + "[run]\nseed = 1\n",
        one="[run]\nseed = -1\niteration = 3\n",
        two="[optimiser]\nlr = 1\n",
        three="run = 3\n",
    )
    said = message(files[:3], ["--train.max_skipped_steps", "x"])
    assert said.startswith(f"{files[0]} + {files[1]} + {files[2]} + the command line: 4 problems\n")
    assert f"run.seed = -1: expected a whole number ≥ 0 and < 2147483648 (from {files[1]})" in said
    assert f"the nearest is run.iterations (from {files[1]})" in said
    assert f"[optimiser]: no such section; the nearest is [optimizer] (from {files[2]})" in said
    assert said.rstrip().count("(from the command line)") == 1
    assert f"(from {files[3]})" in message([files[0], files[3]])
    assert message([files[0], tmp_path / "absent.toml"]).startswith(f"{tmp_path / 'absent.toml'}: no such file")


def test_run_name_and_folder_are_named_after_benchmark_and_method(tmp_path):
    names = MINIMAL + '[run]\nname = "m-{benchmark}-{method}"\noutput_dir = "runs/{benchmark}/{method}/{seed}"\n'
    files = write_all(tmp_path, base=names, task='[run]\nbenchmark = "physics"\n', own='[run]\nmethod = "x-1"\n')
    run = load_config(files[:2]).run
    assert (run.name, run.output_dir) == ("m-physics-srpo", "runs/physics/srpo/{seed}")
    assert load_config(files[:2], ["--algorithm.name", "grpo"]).run.output_dir == "runs/physics/grpo/{seed}"
    assert load_config(files).run.name == "m-physics-x-1"
    assert "run.name = " in message(files[:1]) and "set run.benchmark" in message(files[:1])
    assert 'expected a name of letters, digits, ".", "_" and "-"' in message(files, ["--run.method", "a/b"])


# ---- documentation ---------------------------------------------------------------------------------------------------


def test_the_configuration_page_is_current():
    again = "python -m megatron_srpo.config.reference > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == markdown(), f"out of date: {again}"


@pytest.mark.parametrize("key", config_fields())
def test_every_key_is_described_in_a_sentence(key):
    text = " ".join((config_fields()[key].description or "").split())
    assert text[:1].isupper() and text.endswith("."), f"{key}: {text!r} does not read as a sentence"
    fragments = [f for f in ("so many", "there is", "anew", "of which", "beside") if re.search(rf"\b{f}\b", text)]
    assert not fragments, f"{key}: rephrase {fragments} in {text!r}"


def test_the_page_takes_meanings_and_defaults_from_the_models():
    assert config_fields()["rollout.rollout_batch_size"].description == "Number of prompts per iteration."
    assert (defaults()["model.path"], defaults()["optimizer.clip_grad"]) == ("required", "1.0")


def test_the_configuration_needs_neither_torch_nor_any_other_heavy_package():
    heavy = "{'torch', 'transformers', 'vllm', 'megatron'}"
    code = f"import sys, megatron_srpo.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_example_loads():
    examples = sorted((ROOT / "examples").rglob("*.toml"))
    assert len(examples) >= 2
    for file in examples:
        assert isinstance(load_config(file), Config)


def test_settings_of_adapters_that_are_not_trained_are_told(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\npath = "m"\n[data]\ntrain = "t"\n[lora]\nalpha = 8.0\nexport = "merged"\n')
    told = []
    load_config(file, [], tell=told.append)
    assert told == ["note: lora.rank = 0 trains all weights, without lora.alpha: no effect"]
    told.clear()
    load_config(file, ["--lora.rank", "4", "--optimizer.lr", "5e-6"], tell=told.append)
    load_config(file, ["--lora.alpha", "32.0"], tell=told.append)
    assert told == []


def test_adapters_at_the_default_learning_rate_of_all_weights_are_told(minimal):
    told = []
    load_config(minimal, ["--lora.rank", "4"], tell=told.append)
    assert len(told) == 1 and "optimizer.lr = 5e-06 is the default" in told[0] and "10 to 20 times" in told[0]
