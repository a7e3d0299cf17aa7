"""Environments: episodes of several turns, in which the model calls tools, runs code, plays, and is told what is wrong.

    base.py       what an environment is: subclass Environment
    registry.py   finds the class of a name: a built-in one or the user's own
    tools.py code.py …      the built-in environments
    sandbox.py    runs a program that a model wrote
    server.py     starts a server that episodes share
    worker.py     the program in which environments run: one process for each episode
    pool.py       the trainer's side of these processes
    episodes.py   runs the episodes of a batch, each as fast as it can

Environments import base.py and what they need. Importing this package imports no torch.
"""

from megatron_srpo.environments.base import Environment, Message, Step, Task
from megatron_srpo.environments.server import start_server

__all__ = ["Environment", "Message", "Step", "Task", "start_server"]
