"""`python -m vllm_server_client` is the command `vllm-server`."""

from vllm_server_client.cli.main import main

if __name__ == "__main__":
    main()
