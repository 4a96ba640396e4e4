"""How calls are sent and answers read, once for threads and once for asyncio.

Everything but the sending itself is in calls.py and retry.py, which both share.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager, closing
from types import TracebackType
from typing import Any, Self

import httpx
import tenacity
from httpx_sse import EventSource

from vllm_server_client import calls, retry
from vllm_server_client.calls import Call

TIMEOUT_S = 600.0           # a request for a model that loads is answered when it is ready
CONNECT_TIMEOUT_S = 5.0
RETRIES = 2
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100)


class Transport:
    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S,
                 connect_timeout_s: float = CONNECT_TIMEOUT_S, max_retries: int = RETRIES,
                 transport: httpx.BaseTransport | None = None) -> None:
        """Raises ValueError for a `base_url` that is none.  `transport` is httpx's, for tests and odd networks."""
        address = calls.address(base_url, api_key)
        self.base_url = address.url
        self._send_options = retry.SendOptions(address.url, timeout_s, connect_timeout_s, max_retries)
        self._http = httpx.Client(base_url=address.url, headers=address.headers, trust_env=address.trust_env,
                                  transport=transport, limits=LIMITS)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def _json(self, call: Call) -> Any:
        return calls.read_json(self._answer(call))

    def _list(self, call: Call) -> Any:
        return calls.read_list(self._answer(call))

    def _answer(self, call: Call) -> httpx.Response:
        """A whole answer with a good status."""
        return self._open(call, whole=True)

    def _events(self, call: Call) -> Generator[Any, None, None]:
        """The chunks of an event stream up to its [DONE]."""
        response = self._open(call)
        with closing(response), self._send_options.translated_in_stream(call):
            calls.check_event_stream(response)
            for event in EventSource(response).iter_sse():
                if event.data == calls.DONE:
                    return
                if event.data:
                    yield calls.read_event(event.data)
            raise calls.ended_early(self.base_url)

    def _feed(self, call: Call) -> Generator[Any, None, None]:
        """Events that have a name each, until the server ends them."""
        response = self._open(call)
        with closing(response), self._send_options.translated_in_stream(call):
            calls.check_event_stream(response)
            for event in EventSource(response).iter_sse():
                if event.data:
                    yield calls.read_event(event.data)

    def _lines(self, call: Call) -> Generator[str, None, None]:
        response, rest = self._open(call), ""
        with closing(response), self._send_options.translated_in_stream(call):
            for piece in response.iter_text():
                *lines, rest = (rest + piece).split("\n")   # the carriage returns of a progress bar end no line
                yield from lines
            if rest:
                yield rest

    def _open(self, call: Call, *, whole: bool = False) -> httpx.Response:
        """An answer with a good status; unless it was read whole, the caller reads and closes it."""
        return tenacity.Retrying(**self._send_options.retrying(call))(self._send, call, whole)

    def _send(self, call: Call, whole: bool) -> httpx.Response:
        request = self._http.build_request(**self._send_options.request(call))
        with self._send_options.translated(call):
            response = self._http.send(request, stream=True)
            if not whole and response.is_success:
                return response
            with closing(response):
                response.read()
        calls.check_status(response)
        return response


class AsyncTransport:
    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S,
                 connect_timeout_s: float = CONNECT_TIMEOUT_S, max_retries: int = RETRIES,
                 transport: httpx.AsyncBaseTransport | None = None) -> None:
        """As Transport's."""
        address = calls.address(base_url, api_key)
        self.base_url = address.url
        self._send_options = retry.SendOptions(address.url, timeout_s, connect_timeout_s, max_retries)
        self._http = httpx.AsyncClient(base_url=address.url, headers=address.headers, trust_env=address.trust_env,
                                       transport=transport, limits=LIMITS)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        traceback: TracebackType | None) -> None:
        await self.aclose()

    async def _json(self, call: Call) -> Any:
        return calls.read_json(await self._answer(call))

    async def _list(self, call: Call) -> Any:
        return calls.read_list(await self._answer(call))

    async def _answer(self, call: Call) -> httpx.Response:
        return await self._open(call, whole=True)

    async def _events(self, call: Call) -> AsyncGenerator[Any, None]:
        response = await self._open(call)
        async with _closing(response), aclosing(EventSource(response).aiter_sse()) as events:
            with self._send_options.translated_in_stream(call):
                calls.check_event_stream(response)
                async for event in events:
                    if event.data == calls.DONE:
                        return
                    if event.data:
                        yield calls.read_event(event.data)
                raise calls.ended_early(self.base_url)

    async def _feed(self, call: Call) -> AsyncGenerator[Any, None]:
        response = await self._open(call)
        async with _closing(response), aclosing(EventSource(response).aiter_sse()) as events:
            with self._send_options.translated_in_stream(call):
                calls.check_event_stream(response)
                async for event in events:
                    if event.data:
                        yield calls.read_event(event.data)

    async def _lines(self, call: Call) -> AsyncGenerator[str, None]:
        response, rest = await self._open(call), ""
        async with _closing(response):
            with self._send_options.translated_in_stream(call):
                async for piece in response.aiter_text():
                    *lines, rest = (rest + piece).split("\n")
                    for line in lines:
                        yield line
                if rest:
                    yield rest

    async def _open(self, call: Call, *, whole: bool = False) -> httpx.Response:
        return await tenacity.AsyncRetrying(**self._send_options.retrying(call))(self._send, call, whole)

    async def _send(self, call: Call, whole: bool) -> httpx.Response:
        request = self._http.build_request(**self._send_options.request(call))
        with self._send_options.translated(call):
            response = await self._http.send(request, stream=True)
            if not whole and response.is_success:
                return response
            async with _closing(response):
                await response.aread()
        calls.check_status(response)
        return response


@asynccontextmanager
async def _closing(response: httpx.Response) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await response.aclose()
