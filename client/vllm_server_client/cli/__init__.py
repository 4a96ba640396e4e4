"""The command `vllm-server`: main.py has the commands' list, each other file some commands with their parts."""
