"""Records what a run does, and shows it while it runs.

metrics.py   metrics.jsonl: one JSON object for each iteration
rollouts.py  rollouts.jsonl: scores, branches, teachers and some texts
trackers.py  TensorBoard and Weights & Biases
progress.py  the display in the terminal
observer.py  `Observer`: one `log(step, metrics)` for all of these
curves.py    reads curves from metrics.jsonl, by iteration, hours or tokens
report.py    draws figures of them
grid.py      tables and figures of several finished runs
published.py the SRPO paper's numbers, which stand beside ours in those tables
"""

from megatron_srpo.observe.observer import Observer, SilentLog

__all__ = ["Observer", "SilentLog"]
