"""Text and files from elsewhere: shown harmlessly, read without a hang, and limited in time."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from megatron_srpo.bridge.errors import BridgeError
from megatron_srpo.bridge.load import read_config
from megatron_srpo.config import read_model_folder
from megatron_srpo.core.errors import ConfigError
from megatron_srpo.core.json_types import read_json
from megatron_srpo.core.text import visible
from megatron_srpo.core.time_limit import TimeIsUp, time_limit
from megatron_srpo.data import prompts
from megatron_srpo.data.dataset import DataError
from megatron_srpo.data.prompts import render_chat
from megatron_srpo.data.tokenizer import tokenizer_from
from megatron_srpo.observe.progress import open_progress
from megatron_srpo.run import cli
from tests.unit.chat_tokenizer import chat_tokenizer

ATTACK = "\x1b]0;title\x07\x1b[2Jgone\rover \x9b5m \u202e \ud800"
SHOWN = "\\x1b]0;title\\x07\\x1b[2Jgone\\rover \\x9b5m \\u202e \\ud800"


def test_control_characters_are_shown_as_escapes_and_other_text_as_it_is():
    assert visible(ATTACK) == SHOWN
    assert visible("a\tb\nü → 数 [bold]") == "a\tb\nü → 数 [bold]"


@pytest.mark.parametrize("mode", ["plain", "live", "off"])
def test_messages_of_a_run_cannot_control_the_terminal(mode):
    console = Console(file=io.StringIO(), force_terminal=False, width=300, _environ={})
    progress = open_progress(mode, name="r", total=1, console=console)
    progress.message(ATTACK)
    progress.close()
    assert SHOWN in console.file.getvalue()


def test_errors_cannot_control_the_terminal(capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert cli._fail(ATTACK) == 2
    assert capfd.readouterr().err == f"error: {SHOWN}\n"


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"\xff", b""])
def test_json_that_cannot_be_read_is_one_kind_of_error(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_a_model_folder_with_a_pipe_a_device_or_a_bomb_is_refused_without_a_hang(tmp_path, kind):
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"regular file|nested"):
        read_model_folder(str(tmp_path))
    with pytest.raises(BridgeError, match=r"regular file|nested"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "index", ["[" * 100_000, '{"weight_map": {"a": ["x"], "b": 1}}', '{"weight_map": []}', "[]", '{"weight_map": 1}']
)
def test_an_odd_index_is_one_message(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        read_model_folder(str(tmp_path))


@pytest.mark.parametrize("header", [b"[" * 100_000, b"[]", b"1", b'{"a": {"data_offsets": [0, "x"]}}', b'{"a": 1}'])
def test_an_odd_header_is_one_message(tmp_path, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        read_model_folder(str(tmp_path))


def test_a_tokenizer_folder_with_a_pipe_is_refused_without_a_hang(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(DataError, match="is a named pipe or a device"):
        tokenizer_from(tmp_path)


def test_a_chat_template_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.05)
    tokenizer = chat_tokenizer()
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    tokenizer.chat_template = loops
    with pytest.raises(DataError, match=r"row 1: the tokenizer's chat template does not come to an end"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}], {}, "row 1")


def test_a_time_limit_leaves_the_alarm_as_it_was_and_other_threads_alone():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeIsUp), time_limit(0.01):
        while True:
            pass
    with time_limit(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    thread = threading.Thread(target=lambda: time_limit(1).__enter__())
    thread.start()
    thread.join()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
