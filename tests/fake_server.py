"""A process that stands in for a vLLM server: its routes and answers, out of random numbers, and every way to fail.

    python -m tests.fake_server HOST PORT BEHAVIOUR_FILE

The file's first line is taken away at each start and says how the server behaves from then on; no line: it is sound.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_srpo.rollout.vllm.answers import pack_answer

BLOCK = Path("/dev/shm") / f"msrpo-test.{os.getpid()}"


def answer(asked: dict, version: str = "default") -> dict:
    """What the seed says, whoever is asked."""
    sampling = asked["sampling_params"]
    draw = random.Random(sampling["seed"])
    ids = [draw.randrange(3, 20) for _ in range(draw.randint(1, sampling["max_tokens"]))]
    content = [{"token_id": token, "logprob": -draw.random()} for token in ids]
    spans = [{"version": version, "start": 0, "end": len(ids)}]
    choice = {"token_ids": ids, "finish_reason": "stop", "logprobs": {"content": content}, "weight_versions": spans}
    return {"choices": [choice]}


def packed(answer: object) -> bytes:
    """An answer as our route sends it; what is none is sent as JSON."""
    if not isinstance(answer, dict) or "choices" not in answer:
        return json.dumps(answer).encode()
    (choice,) = answer["choices"]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    header = {name: value for name, value in choice.items() if name not in ("token_ids", "logprobs")}
    return pack_answer(header, choice["token_ids"], logprobs)


def damaged(asked: dict, behaviour: str) -> object:
    """An answer that is none."""
    sound = answer(asked)
    (choice,) = sound["choices"]
    if behaviour == "tokens":
        choice["token_ids"] = [*choice["token_ids"], 5]
    elif behaviour == "logprobs":
        choice["logprobs"]["content"].pop()
    elif behaviour == "version":
        return answer(asked, version="7")
    elif behaviour == "spans":
        choice["weight_versions"][0]["end"] -= 1
    elif behaviour == "reason":
        choice["finish_reason"] = "tired"
    elif behaviour == "empty":
        return {}
    elif behaviour == "list":
        return [1, 2]
    return sound


class Handler(BaseHTTPRequestHandler):
    behaviour = "sound"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {os.environ['MEGATRON_SRPO_ENGINE_TOKEN']}":
            return self.reply(401, b"{}")
        found = {"/health": None, "/get_world_size": {"world_size": 1}, "/weight_info": {"weight_version": "default"}}
        self.reply(200, json.dumps(found[self.path]).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour = self.behaviour
        if behaviour == "die":
            print("Error: out of luck", flush=True)
            os._exit(3)
        if behaviour == "never":
            time.sleep(3600)
        if behaviour == "refuse":
            self.reply(400, b'{"error": "the prompt is cursed"}')
        elif behaviour == "broken":
            self.reply(500, b'{"error": "engine core is dead"}')
        elif behaviour == "garbage":
            self.reply(200, b"<html>\xff\xfe</html>")
        else:
            self.reply(200, packed(damaged(asked, behaviour)))


def main(host: str, port: str, file: str) -> None:
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    if lines:
        Handler.behaviour = lines[0]
        Path(file).write_text("".join(f"{line}\n" for line in lines[1:]))
    if Handler.behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if Handler.behaviour == "no start":
        sys.exit("ValueError: the model is too large")
    if Handler.behaviour == "shared memory":
        with BLOCK.open("wb") as block:
            block.truncate(mmap.PAGESIZE)
        with BLOCK.open("r+b") as block:
            Handler.held = mmap.mmap(block.fileno(), mmap.PAGESIZE)
        print(BLOCK, flush=True)
    ThreadingHTTPServer.allow_reuse_address = False
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
