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

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.peers.work import STEPS, Work, in_turns, measure, ours, reward_of, step_clock, works_of

FORMS = {
    "trl": None,
    "plain": {"share_prompts": False, "teacher_head_mib": 0},
    "shared": {"share_prompts": True, "teacher_head_mib": 0},
    "one pass": {"share_prompts": True},
}
TOPK = 100


def trl(work: Work, folder: Path) -> list[float]:
    """CPU-seconds of each step, the first included. They contain the handing over of rollouts and rewards, which is
    small."""
    import torch
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

    from tests.tiny_models import tiny_tokenizer

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

    clock, batch = step_clock(), work.batch or whole
    with tempfile.TemporaryDirectory() as scratch:
        settings = SDPOConfig(
            output_dir=scratch, use_cpu=True, bf16=False, per_device_train_batch_size=batch,
            gradient_accumulation_steps=whole // batch,
            num_generations=work.samples, max_steps=STEPS + 1, max_completion_length=work.response,
            max_prompt_length=work.prompt, gradient_checkpointing=False, learning_rate=1e-6, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
            distillation_mode="topk_logits", distillation_topk=TOPK, distillation_add_tail=True, distillation_alpha=0.5,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": str(number)} for number in range(work.prompts)] * (STEPS + 1))
        trainer = MadeUp(
            str(folder), reward_funcs=reward_of(work), args=settings, train_dataset=rows,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.teacher_context_builder = TeacherPrompts(trainer)
        trainer.add_callback(clock)
        trainer.train()
    return clock.seconds


def main(
    hidden: int = 256,
    layers: int = 8,
    vocabulary: int = 2048,
    prompts: int = 8,
    samples: int = 8,
    repeats: int = 3,
    trl_batch: Annotated[int, typer.Option(help="TRL's samples in one forward pass. 0: all.")] = 0,
    case: Annotated[list[str] | None, typer.Option(help="PROMPT:RESPONSE, may be repeated.")] = None,
    form: Annotated[str, typer.Option(hidden=True, help="Measure this form here.")] = "",
) -> None:
    works = works_of(
        case, hidden=hidden, layers=layers, vocabulary=vocabulary, prompts=prompts, samples=samples, batch=trl_batch
    )
    if form:
        algorithm = {"name": "sdpo", "distillation_topk": TOPK}
        mine = partial(ours, algorithm=algorithm, train=FORMS[form])
        print("RESULT", json.dumps(measure(works[0], trl if form == "trl" else mine)))
        return
    in_turns("benchmarks.peers.sdpo", works, list(FORMS), repeats)


if __name__ == "__main__":
    typer.run(main)
