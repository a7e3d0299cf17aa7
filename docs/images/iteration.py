"""Draws docs/images/iteration.png: the steps of an iteration, where they run, and the records between them.

python docs/images/iteration.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

LANES = {  # y of the lane's middle, label, colour
    "engines": (3.2, "engines (vLLM)\nand reward\nworkers", "#fdf1e3"),
    "rank 0": (1.85, "rank 0", "#e8f1fb"),
    "ranks": (0.5, "all training\nranks\n(Megatron)", "#eaf5ea"),
}
STEPS = [  # x, lane, what happens, the record that goes to the next step
    (1.9, "rank 0", "next batch\nof prompts", "Prompt"),
    (3.7, "engines", "generate\nG responses\nper prompt", "Rollout"),
    (5.8, "engines", "score each\nresponse", "Reward"),
    (5.8, "rank 0", "group by\nprompt", "Group"),
    (7.7, "rank 0", "algorithm\ngives credit", "Credit"),
    (9.6, "rank 0", "build samples,\nplan rows", "Sample, Row"),
    (9.6, "ranks", "scoring passes:\nold, top-k, teacher,\nreference", "scores"),
    (6.75, "ranks", "train steps:\nΣ weight · term", "weights"),
    (3.7, "ranks", "publish,\nbucket by bucket", "weights"),
    (3.7, "engines", "", ""),
]
WIDTH, HEIGHT = 1.34, 0.78


def main() -> None:
    figure, axes = plt.subplots(figsize=(11.2, 4.4), dpi=120)
    for y, label, colour in LANES.values():
        axes.add_patch(FancyBboxPatch((0.02, y - 0.58), 10.36, 1.16, boxstyle="round,pad=0.02", fc=colour, ec="none"))
        axes.text(0.1, y, label, ha="left", va="center", fontsize=8.5, color="#555555")
    for start, end in pairwise(STEPS):
        _arrow(axes, start, end)
    for x, lane, text, _ in STEPS[:-1]:
        y = LANES[lane][0]
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0.02", fc="white", ec="#444444"))
        axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xlim(0, 10.4)
    axes.set_ylim(-0.12, 3.82)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", pad_inches=0.05)


def _arrow(axes: plt.Axes, start: tuple[float, str, str, str], end: tuple[float, str, str, str]) -> None:
    """An arrow between two boxes, with the record's name in its middle."""
    (x, lane, _, record), (next_x, next_lane, _, _) = start, end
    y, next_y = LANES[lane][0], LANES[next_lane][0]
    if y == next_y:
        side = WIDTH / 2 + 0.04 if next_x > x else -WIDTH / 2 - 0.04
        points = (x + side, y), (next_x - side, y)
        label = ((x + next_x) / 2, y + 0.2)
    else:
        side = HEIGHT / 2 + 0.04 if next_y > y else -HEIGHT / 2 - 0.04
        points = (x, y + side), (next_x, next_y - side)
        label = ((x + next_x) / 2, (y + next_y) / 2)
    axes.add_patch(FancyArrowPatch(*points, arrowstyle="-|>", mutation_scale=12, color="#444444", shrinkA=0, shrinkB=0))
    box = {"boxstyle": "round,pad=0.18", "fc": "#fffbe6", "ec": "#b8a23a", "lw": 0.7}
    axes.text(*label, record, ha="center", va="center", fontsize=7, family="monospace", bbox=box)


if __name__ == "__main__":
    main()
