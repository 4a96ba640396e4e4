"""The SDK with asyncio: many requests at once.

    python examples/demo_async.py [MODEL]       the server: VLLM_SERVER_URL, else http://127.0.0.1:5000
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # in a checkout; elsewhere: pip install ./client

from client import AsyncVLLMProxyClient, VLLMProxyError

QUESTIONS = ("What is a GPU?", "What is a token?", "What is a cache?")


async def main(model: str = "demo") -> None:
    async with AsyncVLLMProxyClient() as client:
        print("models: ", ", ".join(f"{one['id']} ({one['status']})" for one in await client.models()))

        answers = await asyncio.gather(*(
            client.chat_completion(model=model, messages=[{"role": "user", "content": question}], max_tokens=16)
            for question in QUESTIONS))
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"{question} ", answer["choices"][0]["message"]["content"])

        print("stream: ", end="")
        async for text in client.chat_completion_stream(
                model=model, messages=[{"role": "user", "content": "Tell me a joke"}], max_tokens=16):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except VLLMProxyError as error:
        sys.exit(f"demo_async: {error}")
