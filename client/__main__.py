"""`python client ps` in a checkout is the command `vllm-server ps`, without installing it."""

from vllm_server_client.cli.main import main

if __name__ == "__main__":
    main()
