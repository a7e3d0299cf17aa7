"""Many episodes at once, without an engine."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import venv
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from megatron_srpo.config import Config, EnvironmentConfig
from megatron_srpo.core import output_log
from megatron_srpo.core.environment import unset_variables
from megatron_srpo.core.errors import UserError
from megatron_srpo.core.output_log import printed_where, rank_log
from megatron_srpo.environments import Task
from megatron_srpo.environments.episodes import EpisodeRunner
from megatron_srpo.environments.pool import EnvironmentPool, EpisodeError, ProgramLost
from tests.tiny_models import tiny_tokenizer

ECHO = """
from megatron_srpo.environments import Environment, Step
class Echo(Environment):
    async def step(self, reply):
        return Step(done=True, reward=float(reply))
"""


def test_hundreds_of_episodes_run_at_once(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO)
    config = EnvironmentConfig(
        classes={"row": f"{tmp_path}/echo.py:Echo"}, processes=400, step_timeout_seconds=120.0
    )  # fmt: skip
    said = []

    async def one(pool, number):
        process = await pool.open()
        try:
            await process.start("row", Task(({"role": "user", "content": "x"},), "", {}, 0, number))
            return (await process.step(str(number))).reward
        finally:
            await process.close()

    async def all_of_them():
        pool = EnvironmentPool(config, said.append)
        try:
            return await asyncio.gather(*(one(pool, number) for number in range(400)))
        finally:
            pool.close()

    assert asyncio.run(all_of_them()) == [float(number) for number in range(400)]
    assert said == []


TASK = Task(({"role": "user", "content": "x"},), "", {}, 0, 0)


def gone(process):
    return not psutil.wait_procs([process], timeout=20)[1]


SERVER = """
import os, subprocess
from megatron_srpo.environments import Environment, Step
class Server(Environment):
    async def step(self, reply):
        server = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if reply == "end":
            os._exit(3)
        return Step([{"role": "user", "content": str(server.pid)}])
"""


def test_what_an_episode_has_started_ends_with_it_and_other_episodes_keep_theirs(tmp_path):
    """Servers of tools, for example, in sessions of their own."""
    (tmp_path / "server.py").write_text(SERVER)
    config = EnvironmentConfig(classes={"row": f"{tmp_path}/server.py:Server"}, step_timeout_seconds=60.0)

    async def begun(pool):
        process = await pool.open()
        await process.start("row", TASK)
        return process, psutil.Process(int((await process.step("go on")).messages[0]["content"]))

    async def several():
        pool = EnvironmentPool(config, [].append)
        try:
            (closed, first), (ending, second), (_, third) = [await begun(pool) for _ in range(3)]
            await closed.close()
            await closed.how
            assert gone(first) and second.is_running() and third.is_running()
            with pytest.raises(EpisodeError, match="exit code 3"):
                await ending.step("end")
            assert gone(second) and third.is_running()
        finally:
            pool.close()
        assert gone(third), "the end of the run ends them all"

    asyncio.run(several())


def refusal(**settings):
    """Why the program of the environments cannot begin. It is all that is said."""
    said = []

    async def begin():
        with closing(EnvironmentPool(EnvironmentConfig(**settings), said.append)) as pool:
            await pool.begin()

    with pytest.raises(UserError) as caught:
        asyncio.run(begin())
    assert said == [], "such as that the program is started again"
    return str(caught.value)


def test_an_interpreter_that_is_no_python_is_told():
    text = refusal(classes={"row": "tools"}, interpreter="/bin/ls")
    assert 'environment.interpreter = "/bin/ls" ended at once' in text and "is it a Python" in text


def test_a_missing_argument_is_told_by_its_name():
    text = refusal(classes={"row": "tools"})
    assert 'the argument "functions" is missing; set environment.arguments.row.functions (it takes functions, ' in text
    assert "object at" not in text
    assert "max_calls = 'x'" in refusal(
        classes={"row": "tools"}, arguments={"row": {"functions": ["a"], "max_calls": "x"}}
    )


def test_variables_that_do_not_exist_are_named(monkeypatch):
    monkeypatch.setenv("SET", "")
    for name in ("UNSET", "GONE"):
        monkeypatch.delenv(name, raising=False)
    (line,) = unset_variables("environment.variables", ["SET", "UNSET", "GONE"])
    assert line.startswith("environment.variables: UNSET, GONE are not set")
    assert unset_variables("environment.variables", ["SET"]) == []


def test_a_run_is_told_once_of_variables_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.delenv("UNSET", raising=False)
    (tmp_path / "echo.py").write_text(ECHO)
    settings = {"classes": {"row": f"{tmp_path}/echo.py:Echo"}, "variables": ["UNSET"]}
    said = []
    config = Config(model={"path": "m"}, data={"train": "t"}, environment=settings)
    with closing(EpisodeRunner(config, None, set(), said.append)):  # no episode needs the chat
        assert len(said) == 1 and said[0].startswith("environment.variables: UNSET is not set")


def test_a_server_that_is_started_by_itself_tells_of_variables_that_do_not_exist(tmp_path, monkeypatch, capsys):
    import megatron_srpo.rollout
    from megatron_srpo.run import engines

    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setattr(megatron_srpo.rollout, "become_server", lambda *settings: None)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = Config(model={"path": str(tmp_path)}, data={"train": "t"}, rollout={"server_environment": ["UNSET"]})
    engines.serve(config, "127.0.0.1", 8000)
    assert "warning: rollout.server_environment: UNSET is not set" in capsys.readouterr().err


def test_a_python_without_our_packages_names_the_missing_one(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare/bin/python")
    text = refusal(classes={"row": "tools"}, interpreter=python)
    assert f'environment.interpreter = "{python}" cannot import' in text and "No module named 'pydantic'" in text


@pytest.mark.parametrize(
    ("environment", "argument"),
    [("openenv", "url"), ("textarena", "game"), ("verifiers", "taskset"), ("python", "attempts")],
)
def test_a_misspelt_argument_is_told_before_anything_of_the_library_is_needed(environment, argument):
    text = refusal(classes={"row": environment}, arguments={"row": {f"{argument}x": "1"}})
    assert f'arguments of a "{environment}" environment' in text and f"{argument}x" in text
    assert f"(it takes {argument}" in text


SERVED = """
import sys, urllib.request
from megatron_srpo.environments import Environment, Step, start_server
SERVER = '''
import http.server, os, sys
class Pid(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args): pass
print("serving on", sys.argv[1])
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Pid).serve_forever()
'''
class Served(Environment):
    @classmethod
    def prepare(cls):
        cls.port = start_server([sys.executable, "-u", "-c", SERVER, "{port}"])
    async def step(self, reply):
        return Step([{"role": "user", "content": urllib.request.urlopen(f"http://127.0.0.1:{self.port}").read().decode()}])
"""


def test_a_server_that_was_killed_is_told_and_started_again_and_ends_with_the_program(tmp_path):
    (tmp_path / "served.py").write_text(SERVED)
    said = []

    async def pid_of(pool):
        episode = await pool.open()
        try:
            await episode.start("row", TASK)
            return int((await episode.step("")).messages[0]["content"])
        finally:
            await episode.close()

    async def play():
        config = EnvironmentConfig(classes={"row": f"{tmp_path}/served.py:Served"})
        with closing(EnvironmentPool(config, said.append)) as pool:
            first = psutil.Process(await pid_of(pool))
            assert await pid_of(pool) == first.pid, "episodes share it"
            waiting = await pool.open()
            first.kill()
            with pytest.raises(ProgramLost):
                for _ in range(600):
                    await waiting.start("row", TASK)
                    await asyncio.sleep(0.1)
            await waiting.close()
            second = psutil.Process(await pid_of(pool))
            assert second.pid != first.pid
        return second

    assert gone(asyncio.run(play()))
    assert len(said) == 1 and "has ended (killed by SIGKILL); it is started again, and its episodes" in said[0], said
    assert re.search(r"its episodes with it\. It said: serving on \d+$", said[0]), "its last words"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["false", "{port}"], "the server 'false .*' ended: exit code 1"),
        (["sh", "-c", "echo no such app >&2; exit 3", "{port}"], "exit code 3. It said: no such app"),
        (["no-such-program", "{port}"], "cannot be started: .*No such file"),
        (["sleep", "9"], r"expected \"\{port\}\" in it"),
        ([], 'expected either url = "http://HOST:PORT" or command'),
    ],
)
def test_a_server_that_does_not_start_is_told(command, told):
    assert re.search(told, refusal(classes={"row": "openenv"}, arguments={"row": {"command": command}}))


OWN = """
from megatron_srpo.environments import Environment, Step
class Own(Environment):
    def __init__(self, level, wait=0.0):
        self.level = level
    @classmethod
    def prepare(cls, level, wait=0.0):
        pass
    def step(self, reply):
        return Step(done=True, reward=self.level)
class Narrow(Own):
    @classmethod
    def prepare(cls):
        pass
class NoClassMethod(Own):
    def prepare(self, **arguments):
        pass
"""


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        (
            "Own",
            {},
            'arguments of Own: the argument "level" is missing; set environment.arguments.row.level (it takes ',
        ),
        ("Own", {"levle": 1}, "environment.arguments.row.levle: there is no such argument (it takes level, wait)"),
        ("Narrow", {"level": 1}, "environment.arguments.row.level: prepare() takes no such argument"),
        ("NoClassMethod", {"level": 1}, "prepare must be a class method; write @classmethod above it"),
    ],
)
def test_arguments_that_a_users_class_lacks_or_does_not_take_are_told_at_the_start(tmp_path, name, arguments, told):
    (tmp_path / "own.py").write_text(OWN)
    text = refusal(classes={"row": f"{tmp_path}/own.py:{name}"}, arguments={"row": arguments})
    assert told in text and "TypeError" not in text, text


WRONG = """
import numpy as np
from megatron_srpo.core.errors import UserError
from megatron_srpo.environments import Environment, Step
MESSAGE = [{"role": "user", "content": "x"}]
class Wrong(Environment):
    def step(self, reply):  # it need not be asynchronous
        return {
            "sync": lambda: Step(MESSAGE, np.bool_(True), np.float32(0.5), tool_calls=np.int64(2)),
            "done": lambda: Step(MESSAGE, 1), "calls": lambda: Step(MESSAGE, tool_calls="two"),
            "text": lambda: Step("hello"), "dict": lambda: Step(MESSAGE[0]),
            "reward": lambda: Step(MESSAGE, reward="good"), "feedback": lambda: Step(MESSAGE, feedback=["bad"]),
            "role": lambda: Step([{"role": "function", "content": "x"}]),
            "raise": self.fail, "cure": self.refuse,
        }[reply]()
    def fail(self):
        raise KeyError("no such level")
    def refuse(self):
        raise UserError("expected a level, got none; name one")
class NoStep(Environment):
    pass
"""


def test_whatever_is_wrong_with_a_step_is_told_by_its_name(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    told = {
        "done": "Step.done must be True or False, got 1",
        "calls": "Step.tool_calls must be a whole number from 0, got 'two'",
        "text": "Step.messages must be a list of messages",
        "dict": "Step.messages must be a list of messages",
        "reward": "Step.reward must be a number or None, got 'good'",
        "feedback": "Step.feedback must be a text or None, got list",
        "role": '"user", "tool", "system" or "assistant"',
        "raise": "KeyError: 'no such level' (wrong.py, line 17, in fail)",
    }

    async def answers():
        found = {}
        with closing(
            EnvironmentPool(EnvironmentConfig(classes={"row": f"{tmp_path}/wrong.py:Wrong"}), [].append)
        ) as pool:
            for reply in ("sync", "cure", *told):
                episode = await pool.open()
                await episode.start("row", TASK)
                try:
                    found[reply] = await episode.step(reply)
                except EpisodeError as error:
                    found[reply] = str(error)
                await episode.close()
        return found

    found = asyncio.run(answers())
    step, cure = found.pop("sync"), found.pop("cure")
    assert cure == "expected a level, got none; name one", "such a message says all"
    assert (step.done, step.reward, step.tool_calls) == (True, 0.5, 2)
    assert [name for name, text in told.items() if text not in found[name]] == [], found
    assert "has no method step(self, reply)" in refusal(classes={"row": f"{tmp_path}/wrong.py:NoStep"})


def test_an_episode_that_fails_because_its_server_has_ended_begins_again(tmp_path):
    """The episode's exception may come before the program has noticed the end of the server."""
    (tmp_path / "served.py").write_text(SERVED.replace("getpid()).encode())", "getpid()).encode()); os._exit(9)"))

    async def play():
        losses = 0
        with closing(
            EnvironmentPool(EnvironmentConfig(classes={"row": f"{tmp_path}/served.py:Served"}), [].append)
        ) as pool:
            for _ in range(5):
                episode = await pool.open()
                try:
                    await episode.start("row", TASK)
                    await episode.step("")
                    await episode.step("")
                except ProgramLost:
                    losses += 1
                finally:
                    await episode.close()
        return losses

    assert asyncio.run(play()) == 5


@pytest.mark.parametrize("how", ["the program ends", "no process can be made"])
def test_what_happens_right_behind_the_order_of_a_process_is_not_lost(tmp_path, monkeypatch, how):
    no_fork = "\nimport os\ndef fork():\n    raise OSError(11, 'no room')\nos.fork = fork\n"
    (tmp_path / "echo.py").write_text(ECHO + (no_fork if how == "no process can be made" else ""))
    config = EnvironmentConfig(classes={"row": f"{tmp_path}/echo.py:Echo"}, step_timeout_seconds=60.0)
    heard, order = asyncio.Event(), EnvironmentPool._fork
    hear = EnvironmentPool._hear

    async def ordered(pool, *given):
        heard.clear()
        await order(pool, *given)
        if how == "the program ends":
            pool._process.kill()
        await heard.wait()

    monkeypatch.setattr(EnvironmentPool, "_fork", ordered)
    monkeypatch.setattr(EnvironmentPool, "_hear", lambda pool: (hear(pool), heard.set()))

    async def play():
        with closing(EnvironmentPool(config, [].append)) as pool:
            try:
                episode = await pool.open()
                try:
                    await episode.start("row", TASK)
                finally:
                    await episode.close()
            finally:
                assert pool._episodes == {} and pool._room._value == config.processes

    if how == "the program ends":
        with pytest.raises(ProgramLost):
            asyncio.run(play())
    else:
        with pytest.raises(EpisodeError, match=r"no process for it: \[Errno 11\] no room"):
            asyncio.run(play())


def test_a_program_that_ends_before_the_order_of_a_process_is_told(tmp_path, monkeypatch):
    (tmp_path / "echo.py").write_text(ECHO)
    config = EnvironmentConfig(classes={"row": f"{tmp_path}/echo.py:Echo"}, step_timeout_seconds=60.0)
    connect = asyncio.open_unix_connection

    async def play():
        with closing(EnvironmentPool(config, [].append)) as pool:

            async def connected(**given):
                pool._lost()
                await pool.begin()  # another episode starts it again
                return await connect(**given)

            monkeypatch.setattr(asyncio, "open_unix_connection", connected)
            episode = await pool.open()
            try:
                assert (await episode.start("row", TASK)).messages
            finally:
                await episode.close()

    asyncio.run(play())


def test_a_program_that_starts_too_slowly_in_the_middle_of_a_run_does_not_end_it(tmp_path, monkeypatch):
    (tmp_path / "echo.py").write_text(ECHO)
    config = EnvironmentConfig(classes={"row": f"{tmp_path}/echo.py:Echo"}, step_timeout_seconds=60.0)
    monkeypatch.setattr("megatron_srpo.environments.pool.AGAIN_SECONDS", 0.0)
    start, slow, said = EnvironmentPool._start, [], []

    def started(pool):
        start(pool)
        if slow:
            slow.pop()
            asyncio.get_running_loop().call_soon(pool._too_slow)  # the time is over

    monkeypatch.setattr(EnvironmentPool, "_start", started)

    async def play():
        with closing(EnvironmentPool(config, said.append)) as pool:
            await pool.begin()
            for slow_starts in (1, 2):
                pool._lost("a server has ended")
                slow.extend([True] * slow_starts)
                await asyncio.gather(*(pool.begin() for _ in range(3)))
            assert pool._start_limit is None
            pool._lost("a server has ended")
            slow.extend([True] * 3)
            with pytest.raises(UserError, match="did not start in 300 s"):
                await pool.begin()

    asyncio.run(play())
    assert sum("they are started again" in line for line in said) == 5


def test_a_program_that_the_system_cannot_start_for_a_moment_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_srpo.environments.pool.AGAIN_SECONDS", 0.0)
    (tmp_path / "echo.py").write_text(ECHO)
    config = EnvironmentConfig(classes={"row": f"{tmp_path}/echo.py:Echo"}, step_timeout_seconds=60.0)
    popen, full, said = subprocess.Popen, [], []

    def start(*given, **named):
        if full:
            full.pop()
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(*given, **named)

    monkeypatch.setattr(subprocess, "Popen", start)

    async def play():
        with closing(EnvironmentPool(config, said.append)) as pool:
            await pool.begin()
            pool._lost("a server has ended")
            full.extend([True] * 2)
            await asyncio.gather(*(pool.begin() for _ in range(3)))
            pool._lost("a server has ended")
            full.extend([True] * 3)
            with pytest.raises(UserError, match=r"cannot run the environments: .*temporarily unavailable"):
                await pool.begin()

    asyncio.run(play())
    assert sum("they are started again" in line for line in said) == 4


def test_a_program_that_is_too_slow_at_the_start_of_a_run_ends_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_srpo.environments.pool.START_SECONDS", 0.0)
    (tmp_path / "echo.py").write_text(ECHO)
    assert "the environments did not start in 0 s" in refusal(classes={"row": f"{tmp_path}/echo.py:Echo"})


def test_a_class_that_cannot_be_prepared_again_for_a_moment_does_not_end_a_run(tmp_path):
    """Its server may find its port taken, or start slowly on a busy machine."""
    (tmp_path / "often.py").write_text(
        ECHO
        + """
    @classmethod
    def prepare(cls):
        starts = __file__ + ".starts"
        with open(starts, "a") as file:
            file.write(".")
        if len(open(starts).read()) == 2:
            raise OSError("the port is taken")
"""
    )
    said = []

    async def play():
        config = EnvironmentConfig(classes={"row": f"{tmp_path}/often.py:Echo"})
        with closing(EnvironmentPool(config, said.append)) as pool:
            await pool.begin()
            pool._lost("a server has ended")
            await pool.begin()

    asyncio.run(play())
    assert "the port is taken" in said[-1] and said[-1].endswith("they are started again")
    assert len((tmp_path / "often.py.starts").read_text()) == 3


TALKING = """
import os, subprocess, sys
from pathlib import Path
from megatron_srpo.environments import Environment, Step
print("imported")
class Talking(Environment):
    def step(self, reply):
        print("model said", reply, "\\udc80")
        if reply == "raise":
            {}["no such level"]
        if reply == "flood":
            for _ in range(40):
                print("x" * 2**20)
        if reply == "kill the program":
            os.kill(os.getppid(), 9)
        return Step(done=True, reward=1.0)
    def close(self):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        Path("closed").write_text("")
        raise RuntimeError("cannot close")
"""


def talk(tmp_path, *replies, log=None, classes="talking.py:Talking"):
    """What the pool says while one episode after the other gets a reply."""
    (tmp_path / "talking.py").write_text(TALKING)
    said = []

    async def play():
        config = EnvironmentConfig(classes={"row": f"{tmp_path}/{classes}"}, step_timeout_seconds=60.0)
        with closing(EnvironmentPool(config, said.append, log)) as pool:
            for reply in replies:
                episode = await pool.open()
                await episode.start("row", TASK)
                try:
                    await episode.step(reply)
                except (EpisodeError, ProgramLost) as error:
                    said.append(str(error))
                await episode.close()
                await asyncio.wait_for(asyncio.shield(episode.how), 60)

    asyncio.run(play())
    return said


def test_what_environments_print_and_raise_is_in_a_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (error,) = talk(tmp_path, "hello", "raise", log=rank_log(str(tmp_path / "out"), "environments", 3, [].append))
    assert error == "exception: KeyError: 'no such level' (talking.py, line 10, in step)"
    text = (tmp_path / "out/environments/rank3.log").read_text()
    assert "imported\n" in text and "model said hello \\udc80\n" in text
    assert "---- kind 'row', sample 0 of" in text and 'talking.py", line 10, in step\n' in text
    assert printed_where(str(tmp_path / "out")) == f"; what user code printed is in {tmp_path}/out/environments"
    assert printed_where(str(tmp_path)) == ""


def test_an_episode_that_has_ended_closes_its_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = rank_log(str(tmp_path), "environments", 0, [].append)
    assert talk(tmp_path, "hello", log=log) == []
    assert (tmp_path / "closed").exists()
    assert "RuntimeError: cannot close" in (tmp_path / "environments/rank0.log").read_text()


def test_a_flood_of_output_leaves_two_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert talk(tmp_path, "flood", "hello", log=rank_log(str(tmp_path), "environments", 0, [].append)) == []
    files = sorted((tmp_path / "environments").iterdir())
    assert [file.name for file in files] == ["rank0.log", "rank0.log.old"]
    assert all(file.stat().st_size <= output_log.LARGEST + 2**20 for file in files)
    assert "model said hello" in files[0].read_text(), "the newest output stays"


def test_the_last_words_of_a_program_that_was_lost_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = talk(tmp_path, "kill the program", log=rank_log(str(tmp_path), "environments", 0, [].append))
    assert (
        "was lost (killed by SIGKILL); it is started again, and its episodes with it. Its output ends with: " in said[0]
    )
    assert f"model said kill the program \\udc80 (log: {tmp_path}/environments/rank0.log)" in said[0]


def test_the_last_words_of_a_program_that_does_not_start_are_told(tmp_path):
    (tmp_path / "dies.py").write_text("import os\nprint('no licence found')\nos._exit(4)\n")
    text = refusal(classes={"row": f"{tmp_path}/dies.py:Any"})
    assert "while it imported environment.classes. Its output ends with: " in text and "no licence found" in text


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "environments").write_text("a file")
    warned = []
    assert talk(tmp_path, "hello", "again", log=rank_log(str(tmp_path), "environments", 0, warned.append)) == []
    assert len(warned) == 1 and "rank0.log cannot be written (" in warned[0]


PAGE = Path(__file__).parents[2] / "docs/environments.md"


def test_the_classes_and_rows_of_the_documentation_work(tmp_path):
    """Each class of "Write one", with the row that stands behind it."""
    section = PAGE.read_text().partition("\n## Write one\n")[2].partition("\n## ")[0]
    classes = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", section, re.S)
    rows = {row["kind"]: row for row in map(json.loads, re.findall(r"```json\n(.*?)```", section, re.S))}
    for file, source in classes:
        (tmp_path / file).write_text(source)
    replies = {
        "guess": ["hm", "50", "37"],
        "files": [
            '<tool_call>{"name": "read", "arguments": {"name": "b.txt"}}</tool_call>',
            '<tool_call>{"name": "read", "arguments": {"name": "a.txt"}}</tool_call>',
            "It is Rome.",
        ],
    }
    names = {"guess": f"{tmp_path}/my_envs.py:Guess", "files": f"{tmp_path}/my_files.py:Files"}

    async def episode(pool, kind):
        row = rows[kind]
        process = await pool.open()
        task = Task(({"role": "user", "content": row["prompt"]},), row["answer"], row, 0, 0)
        started = await process.start(kind, task)
        steps = [await process.step(reply) for reply in replies[kind]]
        await process.close()
        assert await process.how == "exit code 0"
        return started, steps

    async def play():
        log = rank_log(str(tmp_path), "environments", 0, [].append)
        with closing(EnvironmentPool(EnvironmentConfig(classes=names), [].append, log)) as pool:
            return [await episode(pool, kind) for kind in ("guess", "files")]

    (_, guesses), (started, reads) = asyncio.run(play())
    assert [step.done for step in guesses] == [False, False, True] and guesses[-1].reward == 1.0
    assert started.tools[0]["function"]["name"] == "read"
    assert [(step.tool_calls, step.tool_errors) for step in reads] == [(1, 1), (1, 0), (0, 0)]
    assert reads[1].messages[0]["content"] == "Rome is a city." and (reads[2].done, reads[2].reward) == (True, 1.0)
    assert not (tmp_path / "environments").exists(), "nothing was printed, so close() has not failed"


DRAWS = """
import random
import numpy as np
from megatron_srpo.environments import Environment, Step
class Plain(Environment):
    async def step(self, reply):
        return Step(done=True)
class Draws(Plain):
    async def start(self, task):
        return [{"role": "user", "content": f"{random.random()} {np.random.rand()}"}]
"""


def started(tmp_path, name, *tasks):
    """What an environment begins with, for each of the tasks."""
    (tmp_path / "draws.py").write_text(DRAWS)

    async def all_of_them():
        found = []
        with closing(EnvironmentPool(EnvironmentConfig(classes={"row": f"{tmp_path}/draws.py:{name}"}), print)) as pool:
            for task in tasks:
                process = await pool.open()
                found.append((await process.start("row", task)).messages)
                await process.close()
        return found

    return asyncio.run(all_of_them())


def test_what_an_environment_draws_belongs_to_its_group(tmp_path):
    tasks = [Task(TASK.messages, "", {}, seed, sample) for seed, sample in ((2**62, 0), (2**62, 1), (5, 0))]
    one, same, other = started(tmp_path, "Draws", *tasks)
    assert one == same
    assert not set(one[0]["content"].split()) & set(other[0]["content"].split())
    assert started(tmp_path, "Draws", tasks[0]) == [one], "another run with the same seed"


def test_a_long_row_reaches_the_model_whole(tmp_path):
    messages = tuple({"role": "user", "content": "é" * 150_000} for _ in range(2))
    assert started(tmp_path, "Plain", Task(messages, "", {}, 0, 0)) == [list(messages)]
