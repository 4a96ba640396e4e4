"""The same server with OpenAI's own SDK (pip install openai).

    python examples/demo_openai_sdk.py [MODEL]  the server: VLLM_SERVER_URL, else http://127.0.0.1:5000
"""

import os
import sys

from openai import OpenAI, OpenAIError


def main(model: str = "demo") -> None:
    url = os.environ.get("VLLM_SERVER_URL", "http://127.0.0.1:5000")
    with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("VLLM_SERVER_API_KEY", "none")) as client:
        print("models: ", ", ".join(one.id for one in client.models.list()))

        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hello!"}], max_tokens=16)
        print("answer: ", answer.choices[0].message.content)

        print("stream: ", end="")
        for chunk in client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Tell me a joke"}], max_tokens=16, stream=True):
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OpenAIError as error:
        sys.exit(f"demo_openai_sdk: {error}")
