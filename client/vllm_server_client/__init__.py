"""Python SDK of vllm-server.

    from vllm_server_client import VLLMProxyClient

    with VLLMProxyClient("http://localhost:5000") as client:
        answer = client.chat_completion("demo", [{"role": "user", "content": "Hello"}])
        print(answer["choices"][0]["message"]["content"])
"""

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import (
    AuthenticationFailed,
    BadAnswer,
    Conflict,
    ConnectionFailed,
    NotFound,
    PermissionDenied,
    ServerError,
    StreamBroken,
    TimedOut,
    TooManyRequests,
    Unavailable,
    VLLMProxyError,
)

__version__ = "0.1.0"

__all__ = ["AsyncVLLMProxyClient", "AuthenticationFailed", "BadAnswer", "Conflict", "ConnectionFailed", "NotFound",
           "PermissionDenied", "ServerError", "StreamBroken", "TimedOut", "TooManyRequests", "Unavailable",
           "VLLMProxyClient", "VLLMProxyError"]
