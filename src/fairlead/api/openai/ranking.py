"""`/v1/rerank` and `/v1/score`: how well texts answer another, by a cross-encoder, or by an embedder's vectors."""

import time
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request as HttpRequest

from fairlead.api.line import AccessLine
from fairlead.api.openai.answers import total_usage
from fairlead.api.openai.bodies import LARGEST, MAX_PROMPTS, Count, Positive
from fairlead.api.openai.door import Door, Elsewhere, answered, left
from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.together import each
from fairlead.api.web import while_connected
from fairlead.core.generation import Embed, Score
from fairlead.core.request import Inference
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import ModelRepository

Truncation = Annotated[int, Meta(ge=-1, le=LARGEST)]
"""Tokens that both texts may have together, longer ones are cut; -1: as many as the model takes."""


class DocumentText(Struct, kw_only=True, forbid_unknown_fields=True):
    text: str


class RankingBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both share."""

    model: str
    truncate_prompt_tokens: Truncation | None = None
    use_activation: bool | None = None
    """false: the model's number as it is, before its activation."""
    user: str | None = None
    priority: Count | None = None


class RerankBody(RankingBody, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "documents"

    query: str
    documents: Annotated[list[str | DocumentText], Meta(max_length=MAX_PROMPTS)]
    top_n: Positive | None = None
    return_documents: bool = True


class ScoreBody(RankingBody, kw_only=True, forbid_unknown_fields=True):
    prompt_parameter: ClassVar[str] = "text_2"

    text_1: str | Annotated[list[str], Meta(max_length=MAX_PROMPTS)]
    text_2: str | Annotated[list[str], Meta(max_length=MAX_PROMPTS)]


class RankingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Ranked(Struct):
    index: int
    """Of the document, among those of the request."""
    relevance_score: float
    document: DocumentText | UnsetType = UNSET


class Ranking(Struct):
    id: str
    model: str
    results: list[Ranked]
    """The best first."""
    usage: RankingUsage


class ScoredPair(Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(Struct):
    id: str
    created: int
    model: str
    data: list[ScoredPair]
    usage: RankingUsage
    object: Literal["list"] = "list"


class Rankings(Door):
    """Rerank and score."""

    def __init__(
        self, repository: ModelRepository, gateway: Inference, finished: Finished, max_body_bytes: int, elsewhere: Elsewhere | None
    ) -> None:
        super().__init__(repository, gateway, finished, max_body_bytes, elsewhere)
        self.operations = (
            self.post("/v1/rerank", "rerank", "Texts in the order in which they answer a question", self.rerank, RerankBody, Ranking),
            self.post("/v1/score", "score", "How well texts answer others", self.score, ScoreBody, Scores),
        )

    async def rerank(self, http: HttpRequest, body: RerankBody, line: AccessLine) -> Any:
        if not body.documents:
            raise BadParameter("Invalid 'documents': empty array. Expected an array with minimum length 1.", "documents", "empty_array")
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        found = await self._scores(http, body, line, [(body.query, text) for text in texts])
        if found is None:
            return left(line)
        scores, usage = found
        best = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
        results = [Ranked(index, scores[index], DocumentText(text=texts[index]) if body.return_documents else UNSET) for index in best]
        return answered(Ranking(f"rerank-{line.id}", body.model, results, usage), line)

    async def score(self, http: HttpRequest, body: ScoreBody, line: AccessLine) -> Any:
        found = await self._scores(http, body, line, _pairs(body))
        if found is None:
            return left(line)
        scores, usage = found
        data = [ScoredPair(index, score) for index, score in enumerate(scores)]
        return answered(Scores(f"score-{line.id}", int(time.time()), body.model, data, usage), line)

    async def _scores(
        self, http: HttpRequest, body: RankingBody, line: AccessLine, pairs: list[tuple[str, str]]
    ) -> tuple[list[float], RankingUsage] | None:
        """None where the client left. Raises FairleadError."""
        tasks = self.info(line.caller, line.model, line.version).tasks
        prompts: list[Score | Embed]
        texts: dict[str, int] = {}
        if "score" in tasks:
            limit = None if body.truncate_prompt_tokens is None else max(body.truncate_prompt_tokens, 0)
            if body.truncate_prompt_tokens == 0:
                raise BadParameter(
                    "Invalid value for 'truncate_prompt_tokens': expected -1, or at least 1.", "truncate_prompt_tokens", "invalid_value"
                )
            raw = body.use_activation is False
            prompts = [Score(text=text, pair=pair, max_tokens=limit, raw=raw) for text, pair in pairs]
        elif "embed" in tasks:
            for name in ("truncate_prompt_tokens", "use_activation"):
                if getattr(body, name) is not None:
                    message = f"'{name}' is not supported for the model '{line.model}': it embeds, and pairs are compared by their vectors."
                    raise BadParameter(message, name, "unsupported_parameter")
            for pair in pairs:
                for text in pair:
                    texts.setdefault(text, len(texts))
            prompts = [Embed(text=text) for text in texts]
        else:
            message = f"The model '{line.model}' neither scores nor embeds: it cannot tell how well one text answers another."
            raise BadParameter(message, "model", "unsupported_model")
        requests = self.requests_of(prompts, line, body.priority)
        for request in requests:
            request.session = request.session or body.user or ""
        deltas = await while_connected(http.scope, http.receive, each(partial(self.only, line), requests))
        if deltas is None:
            return None
        num_tokens = total_usage(deltas).prompt_tokens
        vectors = [np.frombuffer(delta.vector, "<f4") for delta in deltas]
        if texts:
            scores = [_cosine(vectors[texts[text]], vectors[texts[pair]]) for text, pair in pairs]
        else:
            scores = [float(vector[0]) for vector in vectors]
        return scores, RankingUsage(num_tokens, num_tokens)


def _pairs(body: ScoreBody) -> list[tuple[str, str]]:
    """One text with each of others, or as many with as many. Raises BadParameter."""
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    for texts, name in ((first, "text_1"), (second, "text_2")):
        if not texts:
            raise BadParameter(f"Invalid '{name}': empty array. Expected an array with minimum length 1.", name, "empty_array")
    if len(first) not in (1, len(second)):
        message = f"Invalid 'text_1': {len(first)} texts for {len(second)} of 'text_2'. Expected one, or as many."
        raise BadParameter(message, "text_1", "invalid_value")
    return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(one @ other) / max(lengths, 1e-12)
