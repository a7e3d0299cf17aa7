"""The pool scores in order; what hangs, dies, eats memory or prints costs its own reward and nothing else."""

import os
import subprocess
import sys
import textwrap
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_srpo.config import RewardConfig
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.records import Prompt, Reward, Rollout
from megatron_srpo.data.prompts import opened_thinking
from megatron_srpo.rewards import RewardPool, RewardTask
from megatron_srpo.run.scorer import PoolScorer
from tests.unit.chat_tokenizer import TEMPLATE, chat_tokenizer

ROOT = Path(__file__).resolve().parents[2]
JUDGE = """
import ctypes, os, signal, sys

def is_socket(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket")
    except OSError:
        return False

def judge(response, answer, metadata):
    word, _, rest = response.partition(" ")
    if word == "hang":
        while True:
            pass
    if word == "exit":
        os._exit(int(rest))
    if word == "segfault":
        ctypes.string_at(0)
    if word == "memory":
        return len(bytearray(1 << 40))
    if word == "eat":
        kept = []
        while True:
            kept.append(bytearray(1 << 24))
    if word == "raise":
        raise KeyError(rest)
    if word == "quit":
        sys.exit(3)
    if word == "half":
        print("x" * 500_000)
        return 0.5
    if word == "print":
        print("x" * 1_000_000)
        print("y" * 1_000_000, file=sys.stderr)
        os.write(1, b"z" * 1_000_000)
    if word == "child":
        child = os.fork()  # not a new program: it has to be there within the time-out of a busy machine
        if not child:
            signal.pause()
        open(rest, "w").write(str(child))
        while True:
            pass
    if word == "fork":
        return 0.25 if os.fork() else 0.75
    if word == "imports":
        return float(bool({"torch", "vllm", "megatron.core", "transformers", "pydantic"} & set(sys.modules)))
    if word == "surrogate":
        return 0.5, "feedback \\ud800", True, "\\udfff"
    if word == "raise-surrogate":
        raise ValueError("\\ud800")
    if word == "channel":
        [descriptor] = [n for n in map(int, os.listdir("/proc/self/fd")) if n > 2 and is_socket(n)]
        os.write(descriptor, rest.replace("NEWLINE", chr(10)).encode())
        return 0.5
    if word == "patch":
        import json
        json.dumps = lambda *unused, **unused_too: "junk"
        return 0.5
    if word == "variable":
        return 1.0, os.environ.get(rest, "not there")
    if word == "nan":
        return float("nan")
    if word == "limits":
        import resource
        return (0.5, str(resource.getrlimit(resource.RLIMIT_CORE)[0]))
    return (float(word), f"feedback for {word} {answer} {metadata.get('k')}", True)
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(JUDGE)
    return f"{path}:judge"


@pytest.fixture(scope="module")
def pool(judge):
    config = RewardConfig(functions={"own": judge}, workers=2, timeout_seconds=1.0, memory_mib=128, failure_score=-1.0)
    with RewardPool(config, ["own", "mcq", "exact"]) as pool:
        yield pool


def own(*responses):
    return [RewardTask("own", response, "a", {"k": 1}) for response in responses]


@pytest.mark.parametrize(("how", "scores"), [("strict", [1.0, 0.0, 0.0]), ("lenient", [1.0, 1.0, 1.0])])
def test_the_format_of_multiple_choice_answers_reaches_the_workers(how, scores):
    with RewardPool(RewardConfig(workers=1, mcq_format=how), ["mcq"]) as pool:
        tasks = [RewardTask("mcq", text, "B") for text in ("<answer>B</answer>", "<answer>B", "B")]
        assert [reward.score for reward in pool.score(tasks)] == scores


def test_rewards_come_in_the_order_of_the_tasks(pool):
    numbers = [index / 1000 for index in range(500)]
    rewards = pool.score([RewardTask("own", str(number), number, {"k": 2}) for number in numbers])
    assert rewards == [Reward(n, f"feedback for {n} {n} 2", True) for n in numbers]
    assert pool.score([]) == []


def test_kinds_are_mixed_in_a_batch(pool):
    tasks = [RewardTask("mcq", "<answer>A</answer>", "A"), *own("0.25"), RewardTask("exact", "no", "yes")]
    assert [reward.score for reward in pool.score(tasks)] == [1.0, 0.25, 0.0]


def test_workers_inherit_no_keys_but_what_the_user_names(judge, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MEGATRON_SRPO_ENGINE_TOKEN", "AWS_PROFILE", "MY_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("LC_TIME", "C")
    config = RewardConfig(functions={"own": judge}, workers=1, environment=["MY_KEY"])
    with RewardPool(config, ["own"]) as pool:
        names = ("WANDB_API_KEY", "HF_TOKEN", "MEGATRON_SRPO_ENGINE_TOKEN", "AWS_PROFILE", "MY_KEY", "LC_TIME")
        found = [reward.feedback for reward in pool.score(own(*(f"variable {name}" for name in names)))]
    assert found == ["not there"] * 4 + ["secret", "C"]


def test_texts_that_no_file_can_express_are_escaped(pool):
    assert pool.score(own("surrogate")) == [Reward(0.5, "feedback \\ud800", True, prediction="\\udfff")]


def test_a_reward_function_that_replaces_json_changes_nothing(pool):
    assert [reward.score for reward in pool.score(own("patch", "patch", "patch", "patch"))] == [0.5] * 4


FAILURES = {
    "hang": "time-out after 1 s",
    "exit 7": "crash: exit code 7",
    "segfault": "crash: killed by SIGSEGV",
    "memory": "crash: out of memory",
    "eat": "crash: out of memory",
    "raise it": "exception: KeyError: 'it'",
    "quit": "exception: SystemExit: 3",
    "nan": "exception: expected a finite score",
    "1e308": "exception: expected a score of at most 1e+12",
    "-1e39": "exception: expected a score of at most 1e+12",
    "raise-surrogate": "exception: ValueError: \\ud800",
    "channel junkNEWLINE": "crash: something has written to its channel that is no result",
    "channel [1]NEWLINE": "crash: something has written to its channel",
    'channel [NaN, "", true, "", null]NEWLINE': "crash: something has written to its channel",
    'channel {"failed": "the run"}NEWLINE': "crash: something has written to its channel",
    "channel [1, 2, 3, 4, 5]NEWLINE": "crash: something has written to its channel",
    "channel \\xff": "crash: something has written to its channel",
    "word": "exception: ValueError: could not convert",
}


@pytest.mark.parametrize("bad", FAILURES)
def test_one_bad_response_fails_alone_and_the_pool_goes_on(pool, bad):
    responses = [str(index / 100) for index in range(40)]
    rewards = pool.score(own(*responses[:17], bad, *responses[17:]))
    failed = rewards.pop(17)
    assert failed.score == -1.0 and failed.error.startswith(FAILURES[bad])
    assert [reward.score for reward in rewards] == [index / 100 for index in range(40)]
    assert not any(reward.error for reward in rewards)


def test_many_bad_responses_among_good_ones(pool):
    responses = ["1", "exit 1", "0.5", "hang", "hang", "0.25", "exit 2", "segfault", "0"] * 2
    errors = [reward.error for reward in pool.score(own(*responses))]
    expected = [None, "crash: exit code 1", None, *["time-out after 1 s (reward.timeout_seconds)"] * 2, None,
                "crash: exit code 2", "crash: killed by SIGSEGV", None] * 2  # fmt: skip
    assert errors == expected


def test_a_worker_that_was_ruined_by_an_earlier_response_does_not_blame_the_next(judge, tmp_path):
    flag = tmp_path / "ruined"
    path = tmp_path / "ruins.py"
    path.write_text(
        "import os\n"
        "ruined = False\n"
        "def judge(response, answer, metadata):\n"
        "    global ruined\n"
        "    if ruined: os._exit(1)\n"
        f"    ruined = response == 'ruin' and not os.path.exists({str(flag)!r})\n"
        f"    if ruined: open({str(flag)!r}, 'w').close()\n"
        "    return 1.0\n"
    )
    config = RewardConfig(functions={"own": f"{path}:judge"}, workers=1, timeout_seconds=5.0)
    with RewardPool(config, ["own"]) as pool:
        rewards = pool.score(own("ruin", *["fine"] * 7))
    assert rewards == [Reward(1.0)] * 8


def test_a_hopeless_expression_is_ended_by_the_time_out():
    config = RewardConfig(workers=1, timeout_seconds=1.0)
    with RewardPool(config, ["math"]) as pool:
        rewards = pool.score([RewardTask("math", rf"\boxed{{{text}}}", "3") for text in ("3", "9^{9^{9^{9}}}", "1+2")])
    assert [reward.score for reward in rewards] == [1.0, 0.0, 1.0] and "time-out" in rewards[1].error


def test_a_function_that_forks_has_one_result_and_the_next_ones_are_their_own(pool):
    rewards = pool.score(own(*["fork", "1", "fork", "0.5"] * 10))
    assert [reward.score for reward in rewards] == [0.25, 1.0, 0.25, 0.5] * 10


def test_what_reward_functions_print_reaches_nobody(pool, capfd):
    assert [reward.error for reward in pool.score(own("print", "print", "1", "print"))][2] is None
    assert capfd.readouterr() == ("", "")


def test_a_function_that_prints_much_does_not_wait_until_the_driver_looks(judge):
    with RewardPool(RewardConfig(functions={"own": judge}, workers=1, timeout_seconds=30.0), ["own"]) as pool:
        pool.add(own("half"))
        (busy,) = [worker for worker in pool._workers if worker.pending]
        assert wait([busy.channel], 25)  # the driver generates meanwhile, and reads nothing
        (reward,) = pool.finish()
        assert (reward.score, reward.error) == (0.5, None) and busy in pool._workers  # no other one had to try again


def test_workers_import_neither_torch_nor_the_engines_and_leave_no_core_files(pool):
    assert [reward.score for reward in pool.score(own("imports", "imports"))] == [0.0, 0.0]
    assert pool.score(own("limits"))[0].feedback == "0"


def test_a_megabyte_response_travels(pool):
    long = "1" + " " + "x" * 1_000_000
    assert [reward.score for reward in pool.score(own(long, "0.5", long, "\ud800"))][:3] == [1.0, 0.5, 1.0]


def test_children_of_a_hanging_function_end_with_it(judge, tmp_path):
    note = tmp_path / "child"
    with RewardPool(RewardConfig(functions={"own": judge}, workers=1, timeout_seconds=0.5), ["own"]) as pool:
        assert "time-out" in pool.score(own(f"child {note}"))[0].error
    wait_for_end(int(note.read_text()))


def workers_of(pool):
    return [worker._process.pid for worker in pool._workers]


def test_closing_leaves_no_process_and_may_be_repeated(judge):
    pool = RewardPool(RewardConfig(functions={"own": judge}, workers=3), ["own"])
    pids = workers_of(pool)
    assert len(pids) == 3 and pool.score(own("1"))[0].score == 1.0
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(own("1"))


def test_workers_that_died_between_two_batches_are_replaced(pool):
    for pid in workers_of(pool):
        os.kill(pid, 9)
    assert [reward.score for reward in pool.score(own("1", "0.5", "0.25"))] == [1.0, 0.5, 0.25]


def test_an_interrupted_batch_leaves_no_results_for_the_next(pool, monkeypatch):
    handle, count = pool._handle_events, iter(range(100))

    def interrupted(**how):
        handle(**how)
        if next(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_handle_events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.score(own(*["1"] * 50, "hang", "hang"))
    monkeypatch.undo()
    assert [reward.score for reward in pool.score(own(*["0.5"] * 30))] == [0.5] * 30
    assert len(workers_of(pool)) == 2


def test_tasks_that_come_bit_by_bit_are_scored_like_a_batch_and_meanwhile(pool):
    responses = ["1", "hang", "0.5", "exit 1", *["0.25"] * 20, "word"]
    whole = pool.score(own(*responses))
    for response in responses:
        pool.add(own(response))
    assert pool.finish() == whole
    assert pool.finish() == []
    pool.score(own("1"))  # the workers of "hang" and "exit" begin again meanwhile; now one of them is idle
    pool.add(own("0.75"))  # an idle worker has it now, whether or not anybody asks for the result
    (worker,) = [worker for worker in pool._workers if worker.pending]
    wait([worker.channel])
    pool.add([])
    assert not worker.pending
    assert pool.finish() == pool.score(own("0.75"))


def test_what_was_added_before_an_interruption_is_forgotten(pool, monkeypatch):
    pool.add(own("1", "1"))
    monkeypatch.setattr(pool, "_assign_chunks", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.finish()
    monkeypatch.undo()
    assert pool.score(own("0.5")) == [Reward(0.5, "feedback for 0.5 a 1", True)]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("import no_such_package_at_all", "cannot import .*no_such_package_at_all"),
        ("def judge(response: return 1", "SyntaxError"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("import os; os._exit(4)", r"ended while it imported the reward functions \(exit code 4\)"),
        ("import os, sys; print('oh dear', file=sys.stderr, flush=True); os._exit(4)", "exit code 4: oh dear"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused_before_training(tmp_path, body, complaint):
    path = tmp_path / "wrong.py"
    path.write_text(body + "\n")
    with pytest.raises(UserError, match=complaint):
        RewardPool(RewardConfig(functions={"own": f"{path}:judge"}), ["own"])


def test_workers_that_are_killed_while_they_start_are_started_again_but_not_for_ever(pool):
    def kill_the_newest() -> None:
        newest = pool._workers[-1]
        os.kill(newest._process.pid, 9)
        while newest in pool._workers:
            pool._handle_events()

    for _ in range(3):  # a ready one, then two while they start
        kill_the_newest()
    while not all(worker.ready for worker in pool._workers):
        pool._handle_events()
    for _ in range(3):
        kill_the_newest()
    with pytest.raises(UserError, match=r"ended while it imported the reward functions \(killed by SIGKILL\)"):
        kill_the_newest()


def test_a_worker_that_starts_too_slowly_on_a_busy_machine_does_not_end_a_run(pool):
    def the_newest_is_too_slow() -> None:
        newest = pool._workers[-1]
        newest.ready = False
        pool._on_timeout(newest)  # and no other event: on a busy machine its message may be there by now

    the_newest_is_too_slow()
    assert [reward.score for reward in pool.score(own("1", "0.5"))] == [1.0, 0.5]
    while not all(worker.ready for worker in pool._workers):
        pool._handle_events()
    for _ in range(2):
        the_newest_is_too_slow()
    with pytest.raises(UserError, match=r"importing the reward functions takes more than 120 s.*reward\.workers"):
        the_newest_is_too_slow()


def test_functions_that_cannot_be_imported_again_for_a_moment_do_not_end_a_run(tmp_path):
    """On a file system that is away, for example."""
    module = tmp_path / "away.py"
    module.write_text("def score(response, answer, **row):\n    return 1.0\n")
    with RewardPool(RewardConfig(workers=1, functions={"own": f"{module}:score"}), ["own"]) as pool:
        text = module.read_text()
        module.unlink()
        pool._remove(pool._workers[0]).kill()
        pool._start()
        while pool._failed_starts == 0:
            pool._handle_events()
        module.write_text(text)
        assert [reward.score for reward in pool.score([RewardTask("own", "x", "")])] == [1.0]
        module.unlink()
        pool._remove(pool._workers[0]).kill()
        pool._start()
        with pytest.raises(UserError, match=r"away\.py"):
            while True:
                pool._handle_events()


def test_an_unknown_kind_is_refused_before_training(pool):
    with pytest.raises(UserError, match=r"unknown reward kind 'mqc'. Did you mean 'mcq'"):
        RewardPool(RewardConfig(workers=1), ["mqc"])
    with pytest.raises(UserError, match=r"'math'.*not among those"):
        pool.score([RewardTask("math", "", "")])


def test_workers_end_when_their_driver_is_killed(judge):
    script = textwrap.dedent(
        f"""
        import os
        from megatron_srpo.config import RewardConfig
        from megatron_srpo.rewards import RewardPool
        pool = RewardPool(RewardConfig(functions={{"own": {judge!r}}}), ["own"])
        print(*[worker._process.pid for worker in pool._workers], flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    for pid in map(int, result.stdout.split()):
        wait_for_end(pid)


def wait_for_end(pid):
    """Until the process is gone or a zombie that nobody collects; at most as long as pidfd says, 10 s."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 10)[0], f"worker {pid} outlived its driver"
    finally:
        os.close(descriptor)


def test_importing_the_rewards_imports_no_torch():
    script = "import sys, megatron_srpo.rewards.worker; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("opening", "scores"), [("", [1.0, 1.0]), ("<think>", [0.0, 1.0])])
def test_a_draft_in_thinking_that_the_template_has_begun_and_the_limit_has_cut_is_no_answer(opening, scores):
    texts = ("Maybe \\boxed{7}, but", "Maybe \\boxed{8}</think> It is \\boxed{7}.")
    rollouts = [Rollout(0, number, [1], [-1.0], text, "length", 0) for number, text in enumerate(texts)]
    control = SimpleNamespace(gather=lambda mine: [mine], share=lambda compute: compute())
    with RewardPool(RewardConfig(workers=1), ["math"]) as pool:
        scorer = PoolScorer(pool, control, threshold=0.5, leads=True, opening=opening)
        read = scorer.start([Prompt("test:0", (), [1], "7", "math")])
        for rollout in rollouts:
            read(rollout)
        (group,) = scorer.finish(rollouts)
    assert [attempt.reward.score for attempt in group.attempts] == scores


def test_what_a_template_has_begun_is_known_unless_rewards_never_see_its_end():
    begins = TEMPLATE.replace("<|im_start|>assistant\n{% if", "<|im_start|>assistant\n<think>\n{% if")
    assert opened_thinking(chat_tokenizer(begins), "assistant\n<think>\n") == "<think>"
    assert opened_thinking(chat_tokenizer(begins), "assistant\n") == ""
    special = chat_tokenizer(begins)
    special.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert opened_thinking(special, "assistant\n<think>\n") == ""


def test_a_scorer_compares_two_answers_by_the_equality_of_their_kind():
    texts = ("\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{3}", "no box")
    prompts = [Prompt("test:0", (), [1], "7", kind) for kind in ("math", "exact")]
    with RewardPool(RewardConfig(workers=1), ["math", "exact"]) as pool:
        scorer = PoolScorer(pool, SimpleNamespace(), threshold=0.5, leads=True)
        found = scorer.same_answers([(prompt, text, "\\frac12") for prompt in prompts for text in texts])
    assert found == [True, True, False, False] + [False] * 4  # an exact answer has no prediction to compare with
