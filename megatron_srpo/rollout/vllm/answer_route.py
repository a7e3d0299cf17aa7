"""The route of a server that answers in arrays. It imports vLLM, so only a server's process imports it."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from megatron_srpo.rollout.vllm.adapter_loader import ADAPTER, adapter_request
from megatron_srpo.rollout.vllm.answers import MEDIA_TYPE, ROUTE, pack_answer


@with_cancellation  # a client that goes away aborts its request
async def generate(request: GenerateRequest, raw_request: Request) -> Response:
    """vLLM's /inference/v1/generate for one response, packed by `pack_answer`. The model `ADAPTER` is the one with the
    adapters of the last publish."""
    if request.model == ADAPTER:
        raw_request.app.state.openai_serving_models.lora_requests.setdefault(ADAPTER, adapter_request())
    answer = await raw_request.app.state.serving_tokens.serve_tokens(request, raw_request)
    if isinstance(answer, ErrorResponse):
        return JSONResponse(content=answer.model_dump(), status_code=answer.error.code)
    (choice,) = answer.choices
    content: list[Any] = choice.logprobs.content if choice.logprobs else []
    if [entry.token_id for entry in content] != list(choice.token_ids):
        raise RuntimeError("vLLM's log-probs are of other tokens than its response")
    header = choice.model_dump(exclude={"token_ids", "logprobs"})
    if answer.metrics is not None and (counts := answer.metrics.speculative_decoding) is not None:
        header["drafted"], header["accepted"] = counts.num_draft_tokens, counts.num_accepted_draft_tokens
    return Response(pack_answer(header, choice.token_ids, [entry.logprob for entry in content]), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Add the route to a server's app."""
    app.add_api_route(ROUTE, generate, methods=["POST"], response_model=None)
