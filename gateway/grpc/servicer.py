"""InferenceService: the pipeline over gRPC. Errors are the kit's interceptor's to map."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc

from gateway import metrics
from gateway.embeddings import EmbeddingRequest, Embeddings
from gateway.grpc import translate
from gateway.http.call import bearer, draw_request_id
from gateway.http.generate import resumption_facts
from gateway.idempotency import check_key
from gateway.identity import INFERENCE, MODELS, Principal
from gateway.pipeline import Pipeline
from gateway.request import Call, GenerationRequest, Prompt, RequestId
from infermesh import rpc
from infermesh.errors import MeshError
from infermesh.telemetry import tracing
from infermesh.v1 import inference_service_pb2 as pb
from infermesh.v1.inference_service_pb2_grpc import InferenceServiceServicer

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
Response = TypeVar("Response", pb.GenerateResponse, pb.ChatResponse)


class InferenceServicer(InferenceServiceServicer):
    """Serves internal backends."""

    def __init__(
        self,
        pipeline: Pipeline,
        embeddings: Embeddings,
        fallback_max_tokens: int | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._embeddings = embeddings
        self._fallback_max_tokens = fallback_max_tokens

    async def Generate(  # gRPC's name
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        parsed = translate.generate_from_pb(request)
        with_ids = request.options.return_token_ids
        answer = self._answer("grpc_generate", parsed, with_ids, context, pb.GenerateResponse)
        async with aclosing(answer) as responses:
            async for response in responses:
                yield response

    async def Chat(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.ChatResponse]:
        parsed = translate.chat_from_pb(request, self._fallback_max_tokens)
        with_ids = request.options.return_token_ids
        answer = self._answer("grpc_chat", parsed, with_ids, context, pb.ChatResponse)
        async with aclosing(answer) as responses:
            async for response in responses:
                yield response

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        metadata = dict(context.invocation_metadata() or ())
        request_id = draw_request_id(metadata.get("x-request-id"))
        parent = str(metadata.get("traceparent", "")) or None
        facts = {"infermesh.request_id": request_id}
        status = grpc.StatusCode.CANCELLED.name
        try:
            with tracing.span(
                "gateway.grpc_embed", traceparent=parent, attributes=facts, serves=True
            ):
                call = _call("grpc_embed", request_id, metadata, context)
                wanted = EmbeddingRequest(request.model, tuple(request.texts))
                found = await self._embeddings.embed(wanted, call)
            status = grpc.StatusCode.OK.name
        except MeshError as error:
            status = error.grpc_code.name
            raise
        finally:
            self._count("grpc_embed", status, request_id)
        return translate.embedded_to_pb(found, request_id)

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: Any
    ) -> pb.CountTokensResponse:
        principal = await self._identify(context, INFERENCE)
        model = self._pipeline.fleet.resolve(request.model)
        principal.require_model(request.model, model.model_id)
        prompt: Prompt = request.text
        if request.messages:
            prompt = translate.conversation_from_pb(request.messages)
        token_ids = await self._pipeline.tokenise(prompt, model)
        return pb.CountTokensResponse(num_tokens=len(token_ids), token_ids=token_ids)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        principal = await self._identify(context, MODELS)
        return pb.ListModelsResponse(models=self._models(principal))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        principal = await self._identify(context, MODELS)
        found = {model.id: model for model in self._models(principal)}
        if request.model not in found:
            model = self._pipeline.fleet.resolve(request.model)  # says why not
            principal.require_model(request.model, model.model_id)
        return pb.GetModelResponse(model=found[request.model])

    def _models(self, principal: Principal) -> list[pb.Model]:
        fleet = self._pipeline.fleet
        generating = translate.models_to_pb(
            (name, model, fleet.num_ready(model.model_id))
            for name, model in fleet.names().items()
            if principal.sees(name, model.model_id)
        )
        embedders = [one for one in self._embeddings.models() if principal.sees(one.model_id)]
        return generating + translate.embedders_to_pb(embedders)

    async def _identify(self, context: Any, scope: str) -> Principal:
        metadata = dict(context.invocation_metadata() or ())
        credential = bearer(str(metadata.get("authorization", "")))
        return await self._pipeline.gate.identify(credential, scope)

    async def _answer(
        self,
        endpoint: str,
        request: GenerationRequest,
        with_ids: bool,
        context: Any,
        make: Callable[..., Response],
    ) -> AsyncGenerator[Response, None]:
        metadata = dict(context.invocation_metadata() or ())
        request_id = draw_request_id(metadata.get("x-request-id"))
        status = grpc.StatusCode.CANCELLED.name
        try:
            with tracing.span(
                f"gateway.{endpoint}", traceparent=metadata.get("traceparent"), serves=True
            ):
                call = _call(endpoint, request_id, metadata, context)
                async with aclosing(self._stream(request, call, with_ids, context)) as batches:
                    async for batch in batches:
                        yield make(request_id=request_id, **batch)
            status = grpc.StatusCode.OK.name
        except MeshError as error:
            status = error.grpc_code.name
            raise
        finally:
            self._count(endpoint, status, request_id)

    def _count(self, endpoint: str, status: str, request_id: RequestId) -> None:
        model = metrics.model_label(self._pipeline.records.model_of(request_id))
        metrics.REQUESTS.labels(endpoint, status, model).inc()

    async def _stream(
        self, request: GenerationRequest, call: Call, with_ids: bool, context: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        reply = await self._pipeline.open(request, call)
        reply.record.stream = True
        failure: BaseException | None = None
        try:
            told = {"x-request-id": call.request_id, **resumption_facts(reply)}
            await context.send_initial_metadata(tuple(told.items()))
            model = reply.model.model_id
            async for batch in reply.batches():
                choices = [translate.delta_to_pb(delta, with_ids) for delta in batch]
                yield {"model": model, "choices": choices}
            cache = reply.record.cache.headers() if reply.record.cache else {}
            facts = {"infermesh-waterfall": reply.waterfall, **cache}
            context.set_trailing_metadata(tuple(facts.items()))
            yield {"model": model, "usage": translate.usage_to_pb(reply.usage())}
        except BaseException as exc:
            failure = exc
            raise
        finally:
            self._pipeline.finish(reply, failure)


def _call(endpoint: str, request_id: Any, metadata: dict[str, Any], context: Any) -> Call:
    remaining_s = rpc.deadline_s(context)
    return Call(
        request_id=request_id,
        endpoint=endpoint,
        credential=bearer(str(metadata.get("authorization", ""))),
        deadline=None if remaining_s is None else time.monotonic() + remaining_s,
        traceparent=tracing.current_traceparent() or str(metadata.get("traceparent", "")),
        cache_control=str(metadata.get("cache-control", "")),
        idempotency_key=check_key(metadata.get("idempotency-key"), "idempotency-key"),
        resume_from=metadata.get("last-event-id"),
    )
