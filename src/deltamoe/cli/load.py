"""The load behind ``deltamoe bench serve``, and what its clients felt.

Prompts and answers have the lengths people's conversations have: log-normal, as in the ShareGPT
collection, scaled to the server at hand and drawn from a seed. Requests come either at random
times (Poisson: nobody waits for anybody) or from a fixed number of clients that never pause. The
client is written on asyncio alone, so that measuring costs little beside what is measured.

Source of the mix: vLLM's and others' serving benchmarks draw ShareGPT; its prompts and answers have
medians of roughly 130 and 200 tokens and a spread of one and a half e-folds.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from deltamoe.errors import ConfigError, DeltamoeError

__all__ = ["Felt", "LoadPlan", "LoadReport", "Percentiles", "ServerAddress", "measure"]


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is asked, how much and when.

    Attributes:
        num_requests: in all.
        rate: requests a second at random times; None for clients that never pause.
        concurrency: such clients.
        prompt_tokens, answer_tokens: medians of the lengths.
        spread: standard deviation of a length's logarithm; 0 makes all equal.
        shared_prefix: tokens that all prompts begin with.
        seed: decides lengths, texts and times.
        timeout_s: after which a request counts as failed.

    Raises:
        ConfigError: a number that is not positive.
    """

    num_requests: int = 64
    rate: float | None = None
    concurrency: int = 8
    prompt_tokens: int = 128
    answer_tokens: int = 64
    spread: float = 1.0
    shared_prefix: int = 0
    seed: int = 0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for key in ("num_requests", "concurrency", "prompt_tokens", "answer_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} = {getattr(self, key)}: expected a whole number >= 1")
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"rate = {self.rate}: expected requests a second, above 0")
        if not 0 <= self.spread <= 3:
            raise ConfigError(f"spread = {self.spread}: expected a number from 0 to 3")

    def requests(self, vocab_size: int, most_tokens: int) -> list[tuple[list[int], int]]:
        """(prompt ids, tokens of the answer) of every request.

        Args:
            vocab_size: ids are drawn below it, at most the 256 that every tokenizer here has.
            most_tokens: prompt and answer together are cut to it.
        """
        chance = random.Random(self.seed)
        shared = [chance.randrange(min(vocab_size, 256)) for _ in range(self.shared_prefix)]
        asked = []
        for _ in range(self.num_requests):
            answer = min(self._length(chance, self.answer_tokens), max(most_tokens // 2, 1))
            read = min(self._length(chance, self.prompt_tokens), max(most_tokens - answer, 1))
            own = [chance.randrange(min(vocab_size, 256)) for _ in range(read)]
            asked.append(((shared + own)[: max(most_tokens - answer, 1)], answer))
        return asked

    def _length(self, chance: random.Random, median: int) -> int:
        return max(1, round(chance.lognormvariate(math.log(median), self.spread)))


@dataclass
class Felt:
    """One request as its client felt it, in seconds.

    Attributes:
        status: of the response; 0 if the connection failed.
        error: what went wrong; "" if nothing.
        num_prompt_tokens, num_tokens: read and written, by the server's own count.
        first_s: until the first text came.
        total_s: until the end.
        gaps_s: between pieces, each divided among the tokens it brought.
    """

    status: int = 0
    error: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Percentiles:
    """Of some times, in milliseconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """The nearest rank below each percentile; nan of nothing."""
        ordered = sorted(seconds)
        if not ordered:
            return cls(math.nan, math.nan, math.nan)
        return cls(
            *(
                1e3 * ordered[min(int(p * len(ordered)), len(ordered) - 1)]
                for p in (0.50, 0.95, 0.99)
            )
        )


@dataclass(frozen=True)
class LoadReport:
    """What a load felt like.

    Attributes:
        num_finished, num_refused, num_failed: answered; told 429 or 503; anything else.
        seconds: from the first request to the last answer.
        prompt_tokens, tokens: read and written by those that finished.
        tokens_per_second: written.
        time_to_first_token_ms, inter_token_ms, total_ms: over requests; over tokens; over requests.
        errors: what went wrong, and how often.
    """

    num_finished: int
    num_refused: int
    num_failed: int
    seconds: float
    prompt_tokens: int
    tokens: int
    tokens_per_second: float
    time_to_first_token_ms: Percentiles
    inter_token_ms: Percentiles
    total_ms: Percentiles
    errors: dict[str, int]

    @classmethod
    def of(cls, felt: Sequence[Felt], seconds: float) -> "LoadReport":
        """Sum up."""
        finished = [one for one in felt if one.status == 200 and not one.error]
        refused = [one for one in felt if one.status in (429, 503)]
        errors: dict[str, int] = {}
        for one in felt:
            if one.error:
                errors[one.error] = errors.get(one.error, 0) + 1
        tokens = sum(one.num_tokens for one in finished)
        return cls(
            num_finished=len(finished),
            num_refused=len(refused),
            num_failed=len(felt) - len(finished) - len(refused),
            seconds=seconds,
            prompt_tokens=sum(one.num_prompt_tokens for one in finished),
            tokens=tokens,
            tokens_per_second=tokens / max(seconds, 1e-9),
            time_to_first_token_ms=Percentiles.of([one.first_s for one in finished]),
            inter_token_ms=Percentiles.of([gap for one in finished for gap in one.gaps_s]),
            total_ms=Percentiles.of([one.total_s for one in finished]),
            errors=errors,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data; percentiles of nothing are null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            return None if isinstance(value, float) and math.isnan(value) else value

        return {key: plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is, and what it is told as a key.

    Attributes:
        host, port: of plain HTTP.
        api_key: "" for none.
    """

    host: str
    port: int
    api_key: str = ""

    @classmethod
    def parse(cls, url: str, api_key: str = "") -> "ServerAddress":
        """From ``http://host:port``; a path such as ``/v1`` is left out.

        Raises:
            ConfigError: not such an address.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"{url}: expected http://host:port")
        return cls(parts.hostname, parts.port or 80, api_key)

    def head(self, method: str, path: str, length: int = 0) -> bytes:
        """The head of a request that closes its connection."""
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Connection: close",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
            *(["Content-Type: application/json"] if length else []),
            f"Content-Length: {length}",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON at a path.

        Raises:
            DeltamoeError: no server there, or no JSON.
        """
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(self.head("GET", path))
            content = await reader.read()
            writer.close()
            head, _, body = content.partition(b"\r\n\r\n")
            answer = json.loads(body)
        except (OSError, ValueError) as fault:
            raise DeltamoeError(f"http://{self.host}:{self.port}{path}: {fault}") from None
        if b" 200 " not in head.partition(b"\r\n")[0] or not isinstance(answer, dict):
            raise DeltamoeError(f"http://{self.host}:{self.port}{path}: {body[:200].decode()}")
        return answer


async def measure(address: ServerAddress, plan: LoadPlan) -> LoadReport:
    """Put a load on a server.

    Raises:
        DeltamoeError: no server there.
    """
    card = (await address.get("/v1/models"))["data"][0]
    vocab_size = int((await address.get("/tokenizer_info"))["vocab_size"])
    asked = plan.requests(vocab_size, int(card["max_model_len"]))
    felt = [Felt() for _ in asked]

    async def ask(number: int) -> None:
        try:
            async with asyncio.timeout(plan.timeout_s):
                await _ask(address, card["id"], *asked[number], felt[number])
        except TimeoutError:
            felt[number].error = f"not finished within {plan.timeout_s:g} s"
        except (OSError, ValueError, asyncio.IncompleteReadError) as fault:
            felt[number].error = type(fault).__name__

    begin = time.perf_counter()
    if plan.rate is None:
        todo = iter(range(len(asked)))

        async def client() -> None:
            for number in todo:
                await ask(number)

        await asyncio.gather(*(client() for _ in range(plan.concurrency)))
    else:
        chance = random.Random(plan.seed + 1)
        running = []
        for number in range(len(asked)):
            running.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(chance.expovariate(plan.rate))
        await asyncio.gather(*running)
    return LoadReport.of(felt, time.perf_counter() - begin)


async def _ask(
    address: ServerAddress, model: str, prompt: list[int], max_tokens: int, felt: Felt
) -> None:
    """One streamed completion of a given length."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    begin = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(address.head("POST", "/v1/completions", len(body)) + body)
        felt.status = int((await reader.readline()).split()[1])
        times: list[tuple[float, int]] = []  # seconds since the piece before, its characters
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if b'"error"' in line:
                felt.error = json.loads(line[6:])["error"]["message"][:100]
            elif b'"choices":[]' in line:
                spent = json.loads(line[6:])["usage"]
                felt.num_prompt_tokens = spent["prompt_tokens"]
                felt.num_tokens = spent["completion_tokens"]
            else:
                times.append((now - last, len(json.loads(line[6:])["choices"][0]["text"])))
                if len(times) == 1:
                    felt.first_s = now - begin
                last = now
    finally:
        writer.close()
    felt.total_s = time.perf_counter() - begin
    if felt.status == 200 and not felt.error and not felt.num_tokens:
        felt.error = "the stream broke off"
    elif felt.status != 200:
        felt.error = f"status {felt.status}"
    tokens_per_character = felt.num_tokens / max(sum(length for _, length in times), 1)
    for gap, length in times[1:]:
        num_tokens = max(round(length * tokens_per_character), 1)
        felt.gaps_s += [gap / num_tokens] * num_tokens
