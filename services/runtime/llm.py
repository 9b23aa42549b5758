"""A language model behind any OpenAI-compatible server (DeepSeek by default), for world2act/segmentation/llm.py.

What goes wrong on the way is handled here: time-outs, 429 with Retry-After, 5xx, replies that are no chat completion or never
end, money. What is wrong *in* an answer is not: the method checks and asks again. The key is sent, never logged.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import Field, SecretStr, field_validator
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential_jitter,
)

from services.runtime.settings import CommonSettings
from world2act.segmentation.llm import Asker, Completion, Memory, Messages

DEEPSEEK = "https://api.deepseek.com"
MAX_REPLY = 2_000_000
"""Bytes of a reply that are read."""

BYTES_PER_TOKEN = 2
"""For the budget, before the server has counted: text has more bytes a token than this, so the estimate is high."""


class LLMUnavailableError(ConnectionError):
    """No answer can be had: the server cannot be reached, refuses, or is out of time. The work may be tried again later."""


class BudgetExceededError(RuntimeError):
    """The next answer might cost more than the budget has left. Nothing more is asked."""


class LLMSettings(CommonSettings):
    """A language model; environment variables W2A_LLM_*. Without a key (and for another server without its URL) there is none."""

    llm_base_url: str = Field(DEEPSEEK, description="OpenAI-compatible server, up to but without /chat/completions")
    llm_model: str = Field("deepseek-v4-flash", min_length=1, description="model name")
    llm_key: SecretStr = Field(SecretStr(""), description="API key; a server of your own may need none")
    llm_format: Literal["json_schema", "json_object", "text"] = Field(
        "json_object",
        description="response_format that the server knows; without json_schema the schema is in the prompt",
    )
    llm_temperature: float = Field(0.0, ge=0.0, le=2.0)
    llm_max_tokens: int = Field(2000, ge=16, le=100_000, description="of one answer")
    llm_attempts: int = Field(3, ge=1, le=10, description="answers to one question before it is given up as rejected")
    llm_retries: int = Field(5, ge=1, le=20, description="tries of one request that fails on the way (429, 5xx, time-out)")
    llm_timeout_s: float = Field(60.0, gt=0, le=600, description="of one try, from request to the last byte")
    llm_patience_s: float = Field(
        120.0, gt=0, le=3600, description="of one request with its retries; no longer Retry-After is obeyed"
    )
    llm_requests_per_minute: float = Field(0.0, ge=0, description="spacing of requests of one process; 0: none")
    llm_budget_tokens: int = Field(2_000_000, ge=0, description="tokens that one process may use, counted as the server does")
    llm_budget_usd: float = Field(0.0, ge=0, description="money that one process may spend, by the prices below; 0: no limit")
    llm_usd_per_million_in: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    llm_usd_per_million_out: float = Field(0.0, ge=0, description="price of a million answer tokens")
    llm_log: Path | None = Field(None, description="prompt log, JSON lines; default llm.jsonl in W2A_RUN_DIR")

    @field_validator("llm_base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        url = httpx.URL(value)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
            raise ValueError("must be http(s)://host/..., without a user, password or query")
        return value.rstrip("/")

    @property
    def llm_configured(self) -> bool:
        """Whether there is a model to ask."""
        return bool(self.llm_key.get_secret_value()) or self.llm_base_url != DEEPSEEK

    @property
    def llm_answering(self) -> dict[str, str | float]:
        """What decides answers besides the model and the question. JSON; no secret, no URL."""
        names = ("format", "max_tokens", "temperature", "attempts")
        return {name: getattr(self, f"llm_{name}") for name in names}

    def llm_log_path(self) -> Path:
        """Where the prompt log is."""
        return self.llm_log or self.run_dir / "llm.jsonl"


class _TryAgainError(Exception):
    """A failure on the way that may pass; after: seconds that the server asks for, or None."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class LLMClient:
    """`Complete` over HTTP, with what it has used: requests, prompt_tokens, completion_tokens, usd. Safe for threads.

    deadline: time.monotonic() after which nothing is asked any more, or None.
    """

    def __init__(self, settings: LLMSettings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        if not settings.llm_configured:
            raise ValueError("llm: is not configured; set W2A_LLM_KEY (DeepSeek) or W2A_LLM_BASE_URL (another server)")
        self.settings = settings
        self.deadline: float | None = None
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self._sleep = sleep
        self._next = 0.0
        self._reserved = 0
        self._lock = threading.Lock()
        key = settings.llm_key.get_secret_value()
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=settings.llm_timeout_s, follow_redirects=False
        )

    @property
    def usd(self) -> float:
        """Money used so far, by the prices in the settings."""
        return self._price(self.prompt_tokens, self.completion_tokens)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __call__(self, messages: Messages, schema: Mapping[str, Any]) -> Completion:
        """One answer. Raises BudgetExceededError before anything is sent, LLMUnavailableError where none can be had."""
        s = self.settings
        body = self._body(messages, schema)
        upper = len(json.dumps(body["messages"]).encode()) // BYTES_PER_TOKEN
        patience = s.llm_patience_s if self.deadline is None else min(s.llm_patience_s, self.deadline - time.monotonic())
        if patience <= 0:
            raise LLMUnavailableError("llm: out of time")
        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(s.llm_retries) | stop_before_delay(patience),
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(self._try, body, upper, patience)
        except _TryAgainError as e:
            raise LLMUnavailableError(f"llm: no answer from {s.llm_base_url}: {e}") from None

    def _body(self, messages: Messages, schema: Mapping[str, Any]) -> dict[str, Any]:
        s = self.settings
        asked = [dict(m) for m in messages]
        if s.llm_format != "json_schema":
            asked[0]["content"] += f"\nThe answer's JSON schema: {json.dumps(schema)}"
        body: dict[str, Any] = {"model": s.llm_model, "messages": asked, "stream": False}
        body |= {"temperature": s.llm_temperature, "max_tokens": s.llm_max_tokens}
        if s.llm_format == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": schema.get("title", "answer"), "strict": True, "schema": dict(schema)},
            }
        elif s.llm_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _try(self, body: dict[str, Any], upper: int, patience: float) -> Completion:
        """One request. Each try reserves what it may cost, and settles for what it did: a lost reply counts in full."""
        self._reserve(upper)
        used: tuple[int, int] = (upper, self.settings.llm_max_tokens)
        try:
            self._pace()
            start = time.monotonic()
            try:
                status, headers, data = self._post(body, start + min(self.settings.llm_timeout_s, patience))
            except (httpx.ConnectError, httpx.ConnectTimeout) as e:
                used = (0, 0)  # it never arrived
                raise _TryAgainError(f"cannot connect ({type(e).__name__})") from None
            except httpx.TimeoutException:
                raise _TryAgainError(f"no reply within {self.settings.llm_timeout_s:g} s") from None
            except httpx.HTTPError as e:
                raise _TryAgainError(f"the connection broke ({type(e).__name__})") from None
            if status != 200:
                used = (0, 0)
                self._refused(status, headers, data)
            completion = self._completion(data, upper, time.monotonic() - start)
            used = (completion.prompt_tokens, completion.completion_tokens)
            return completion
        finally:
            self._settle(upper, used)

    def _post(self, body: dict[str, Any], until: float) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and at most MAX_REPLY bytes; a reply that only drips ends at `until`."""
        with self._http.stream("POST", f"{self.settings.llm_base_url}/chat/completions", json=body) as reply:
            data = b""
            for part in reply.iter_bytes():
                data += part
                if len(data) > MAX_REPLY:
                    raise _TryAgainError(f"the reply is longer than {MAX_REPLY} bytes")
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("the reply takes too long")
            return reply.status_code, reply.headers, data

    def _refused(self, status: int, headers: httpx.Headers, data: bytes) -> None:
        """Raise for a status that is not 200: again later, or never."""
        text = data[:2000].decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(data)["error"]["message"])
        if key := self.settings.llm_key.get_secret_value():
            text = text.replace(key, "***")
        why = f"status {status}: {' '.join(text.split())[:300]}"
        if status in (408, 409, 425, 429) or status >= 500:
            raise _TryAgainError(why, _retry_after(headers))
        raise LLMUnavailableError(f"llm: {self.settings.llm_base_url} refuses: {why}")

    def _completion(self, data: bytes, upper: int, seconds: float) -> Completion:
        """The first choice. A reply that is no chat completion is a failure on the way; an answer of any content is not."""
        try:
            reply = json.loads(data)
            choice = reply["choices"][0]
            text = choice["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _TryAgainError("the reply is no chat completion") from None
        usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        estimates = (upper, len((text or "").encode(errors="replace")) // BYTES_PER_TOKEN + 1)
        tokens = [n if type(n) is int and n >= 0 else e for n, e in zip(counts, estimates, strict=True)]
        return Completion(text or "", choice.get("finish_reason") == "length", tokens[0], tokens[1], seconds)

    # -- budget and pace -------------------------------------------------------------------------------------------

    def _price(self, prompt: int, answer: int) -> float:
        s = self.settings
        return (prompt * s.llm_usd_per_million_in + answer * s.llm_usd_per_million_out) / 1e6

    def _reserve(self, upper: int) -> None:
        """Set aside what one try may cost. Raises BudgetExceededError where that is more than is left."""
        s = self.settings
        with self._lock:
            used = self.prompt_tokens + self.completion_tokens
            if used + self._reserved + upper + s.llm_max_tokens > s.llm_budget_tokens:
                raise BudgetExceededError(
                    f"llm: the budget of {s.llm_budget_tokens} tokens (W2A_LLM_BUDGET_TOKENS) is spent: {used} used, and "
                    f"the next answer may take {upper + s.llm_max_tokens}"
                )
            worst = self.usd + self._price(self._reserved + upper, s.llm_max_tokens)
            if s.llm_budget_usd and worst > s.llm_budget_usd:
                raise BudgetExceededError(
                    f"llm: the budget of {s.llm_budget_usd:g} USD (W2A_LLM_BUDGET_USD) is spent: {self.usd:.4f} used"
                )
            self._reserved += upper + s.llm_max_tokens

    def _settle(self, upper: int, used: tuple[int, int]) -> None:
        with self._lock:
            self._reserved -= upper + self.settings.llm_max_tokens
            self.requests += 1
            self.prompt_tokens += used[0]
            self.completion_tokens += used[1]

    def _pace(self) -> None:
        """Wait for this request's turn under llm_requests_per_minute."""
        if not self.settings.llm_requests_per_minute:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60 / self.settings.llm_requests_per_minute
        self._sleep(turn - now)


_BACKOFF = wait_exponential_jitter(initial=0.5, max=30)


def _wait(state: RetryCallState) -> float:
    """What the server asks for, else longer each time."""
    error = state.outcome.exception() if state.outcome else None
    after = error.after if isinstance(error, _TryAgainError) else None
    return _BACKOFF(state) if after is None else after


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None if it has none that can be read."""
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


class PromptLog:
    """Appends records to a JSON-lines file, each in one write, so that processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, record: dict[str, Any]) -> None:
        """Append one record."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **record}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def make_asker(settings: LLMSettings, memory: Memory) -> tuple[Asker, LLMClient]:
    """What asks, and the client that it asks through. Raises ValueError where no model is configured."""
    client = LLMClient(settings)
    log = PromptLog(settings.llm_log_path())
    model = f"{settings.llm_model} {settings.llm_temperature:g} {settings.llm_max_tokens} {settings.llm_format}"
    return Asker(client, model=model, attempts=settings.llm_attempts, memory=memory, log=log), client
