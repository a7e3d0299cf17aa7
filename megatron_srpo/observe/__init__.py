"""What a run leaves behind and shows while it goes.

metrics.py   metrics.jsonl: one JSON object an iteration
rollouts.py  rollouts.jsonl: scores, branches, teachers and some texts
trackers.py  TensorBoard and Weights & Biases
progress.py  the terminal
observer.py  all of these behind one `log(step, metrics)`
report.py    figures from metrics.jsonl
"""

from megatron_srpo.observe.observer import Observer, SilentLog

__all__ = ["Observer", "SilentLog"]
