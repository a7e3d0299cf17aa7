"""Records what a run does, and shows it while it runs.

metrics.py   metrics.jsonl: one JSON object for each iteration
rollouts.py  rollouts.jsonl: scores, branches, teachers and some texts
trackers.py  TensorBoard and Weights & Biases
progress.py  the display in the terminal
observer.py  `Observer`: one `log(step, metrics)` for all of these
report.py    draws figures from metrics.jsonl
"""

from megatron_srpo.observe.observer import Observer, SilentLog

__all__ = ["Observer", "SilentLog"]
