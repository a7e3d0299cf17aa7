"""An SDPO step of ours beside TRL's: CPU-seconds and memory on the same model, prompts, responses and rewards.

    pip install --target DIR -r benchmarks/peers/requirements.txt --no-deps accelerate datasets multiprocess dill xxhash
    PYTHONPATH=DIR python -m benchmarks.peers.sdpo [--case 240:16] [--samples 8] [--repeats 3]

As benchmarks/peers/grpo.py, with TRL's experimental SDPOTrainer. Every response has a correct sibling, so both sides
distil all of them: the student is trained on prompt and response, and an EMA teacher reads the prompt, a correct
sibling and the same response. Both compare the student's top-100 ids and a tail by a Jensen–Shannon divergence, and
move the teacher after the step. TRL shows every teacher of a prompt the first correct response, ours shows a random
one, so that fewer of our teacher prompts are the same.

Forms of ours: "plain" has a prompt for each sample, and a pass of its own for the student's top-k ids; "shared" shares
prompts; "one pass" also finds the ids in the train pass, which is the default.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import typer

from benchmarks.peers.work import Work, command, ours, trl_settings, trl_steps

TOPK = 100


def trl(work: Work, folder: Path) -> list[float]:
    import torch
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

    prompts, responses = work.tokens()
    whole = work.prompts * work.samples

    class MadeUp(SDPOTrainer):
        """Takes the made-up tokens in the place of prompts and responses."""

        def _tokenize_prompts(self, given: list[Any]) -> list[list[int]]:
            return [prompts[int(text)] for text in given]

        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            assert prompt_ids == [prompt for prompt in prompts for _ in range(work.samples)]
            return prompt_ids, [ids for group in responses for ids in group]

    class TeacherPrompts(SuccessfulRolloutTeacherContextBuilder):
        def _tokenize_teacher_messages(self, messages: list[Any]) -> dict[str, torch.Tensor]:
            assert len(messages) == whole
            places = [divmod(place, work.samples) for place in range(whole)]
            ids = [work.teacher_prompt(number, work.demonstration(sample)) for number, sample in places]
            return {"prompt_ids": torch.tensor(ids), "prompt_mask": torch.ones(whole, len(ids[0]), dtype=torch.long)}

    def prepare(trainer: Any) -> None:
        trainer.teacher_context_builder = TeacherPrompts(trainer)

    with tempfile.TemporaryDirectory() as scratch:
        settings = SDPOConfig(
            **trl_settings(work, scratch), max_prompt_length=work.prompt, distillation_mode="topk_logits",
            distillation_topk=TOPK, distillation_add_tail=True, distillation_alpha=0.5,
        )  # fmt: skip
        return trl_steps(work, folder, partial(MadeUp, args=settings), prepare)


FORMS = {
    "plain": {"share_prompts": False, "teacher_head_mib": 0},
    "shared": {"share_prompts": True, "teacher_head_mib": 0},
    "one pass": {"share_prompts": True},
}

if __name__ == "__main__":
    sdpo = partial(ours, algorithm={"name": "sdpo", "distillation_topk": TOPK})
    ways = {name: partial(sdpo, train=train) for name, train in FORMS.items()}
    typer.run(command("benchmarks.peers.sdpo", trl, ways))
