"""The SDK in a few lines.

    python examples/demo_sync.py [MODEL]        the server: VLLM_SERVER_URL, else http://127.0.0.1:5000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # in a checkout; elsewhere: pip install ./client

from client import NotFound, VLLMProxyClient, VLLMProxyError


def main(model: str = "demo") -> None:
    with VLLMProxyClient() as client:
        print("models: ", ", ".join(f"{one['id']} ({one['status']})" for one in client.models()))

        answer = client.chat_completion(
            model=model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=16)
        print("answer: ", answer["choices"][0]["message"]["content"])
        print("tokens: ", answer["usage"]["total_tokens"])

        print("stream: ", end="")
        for text in client.chat_completion_stream(
                model=model, messages=[{"role": "user", "content": "Tell me a joke"}], max_tokens=16):
            print(text, end="", flush=True)
        print()

        try:
            client.chat_completion(model="no-such-model", messages=[{"role": "user", "content": "Hello?"}])
        except NotFound as error:
            print("error:  ", error.code)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except VLLMProxyError as error:
        sys.exit(f"demo_sync: {error}")
