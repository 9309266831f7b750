"""A server that speaks the OpenAI API, as far as an audit asks it: texts, the ids in them, and laws of the next id."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 600.0
ID_PREFIX = "token_id:"  # how vLLM writes ids where it is asked for them in place of texts
UNCHANGED = {"top_k": 0, "min_p": 0.0}  # a server's own defaults may cut the law that is sampled from


@dataclass(frozen=True)
class Law:
    """Log probabilities of the most likely next ids; `rest` is the probability of all others together."""

    logprobs: dict[int, float]

    @property
    def rest(self) -> float:
        return max(0.0, 1 - math.fsum(map(math.exp, self.logprobs.values())))

    def logprob(self, token: int) -> float:
        """Of an id that is not listed the largest that it can have."""
        return self.logprobs.get(token, min(self.logprobs.values()))


@dataclass(frozen=True)
class Completion:
    """A text; its ids, and the law at each of them, where the server shows those. num_ids: as the server counts."""

    text: str
    ids: list[int] | None
    laws: list[Law] | None
    num_ids: int | None


class Refused(ValueError):
    """A server answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server of one model. Raises ValueError, naming the URL, where a request fails.

    url: with or without /v1. model: as requests name it; None: the first that the server lists.
    is_extended: whether it takes more fields than OpenAI's; found out by the first request.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no URL of a server, such as http://localhost:8000")
        self.version: str | None = None  # as its answers give it
        self.is_extended = True
        self._has_answered = False
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        answer = self._request("/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url}/v1/models lists no model; name one with --server-model") from error

    def tokenize(self, text: str) -> list[int] | None:
        """The ids of a text; None where the server has no /tokenize."""
        body = {"model": self.model, "content": text, "prompt": text, "add_special": True}
        try:
            answer = self._request("/tokenize", body)
        except ValueError:
            return None
        tokens = answer.get("tokens")
        is_known = isinstance(tokens, list) and all(isinstance(token, int) for token in tokens)
        return tokens if is_known else None

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        num_logprobs: int = 0,
        read_again: bool = False,
    ) -> Completion:
        """One request.

        num_logprobs: of each position; 0: neither ids nor laws. read_again: read the prompt as a whole, without what a
        cache holds of it, where the server has such a setting.
        """
        body: dict[str, Any] = {"model": self.model, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body |= {"max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed}
        extensions: dict[str, Any] = dict(UNCHANGED)
        if num_logprobs:
            body["logprobs"] = num_logprobs
            extensions["return_tokens_as_token_ids"] = True
        if read_again:
            extensions["cache_prompt"] = False
        try:
            answer = self._request("/v1/completions", body | (extensions if self.is_extended else {}))
        except Refused as error:
            if self._has_answered or error.status not in (400, 422):
                raise
            answer = self._request("/v1/completions", body)
            self.is_extended = False
        self._has_answered = True
        try:
            choice = answer["choices"][0]
            ids, laws = _parse_logprobs(choice.get("logprobs"))
            self.version = answer.get("system_fingerprint") or self.version
            return Completion(choice["text"], ids, laws, (answer.get("usage") or {}).get("completion_tokens"))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.url}/v1/completions answered in another format: {str(answer)[:200]}") from error

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()[:300]
            raise Refused(f"{self.url}{path} answered {error.code}: {said or error.reason}", error.code) from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.url}{path} did not answer: {error}") from error


def _parse_logprobs(logprobs: Any) -> tuple[list[int] | None, list[Law] | None]:
    """Ids and laws, from llama.cpp's `content` with ids, or from vLLM's `tokens` with ids as texts; else None."""
    if not logprobs:
        return None, None
    content = logprobs.get("content")
    if content is not None:
        if not all("id" in position for position in content):
            return None, None
        laws = [Law({top["id"]: top["logprob"] for top in position["top_logprobs"]}) for position in content]
        return [position["id"] for position in content], laws if all(law.logprobs for law in laws) else None
    tokens = logprobs.get("tokens") or []
    if not tokens or not all(token.startswith(ID_PREFIX) for token in tokens):
        return None, None
    laws = [
        Law({_id(name): logprob for name, logprob in (position or {}).items()})
        for position in logprobs.get("top_logprobs") or []
    ]
    has_laws = len(laws) == len(tokens) and all(law.logprobs for law in laws)
    return [_id(token) for token in tokens], laws if has_laws else None


def _id(token: str) -> int:
    return int(token.removeprefix(ID_PREFIX))


def together(calls: Sequence[Callable[[], Completion]], load: int) -> list[Completion]:
    """The results of requests, of which `load` are under way at a time."""
    with ThreadPoolExecutor(load) as pool:
        return list(pool.map(lambda call: call(), calls))
