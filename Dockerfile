# Two images; docs/DEPLOYMENT.md shows how they are run.
#
#   docker build -t vllm-server .                             with vLLM, for machines with NVIDIA GPUs (the last stage)
#   docker build -t vllm-server:router --target router .      without an engine, for servers.toml: 150 MB instead of 15 GB
#
# Both run as a user of their own, keep state and downloads in /data, and read .env, config.yaml (or configs/config.yaml)
# and servers.toml in /app.

ARG VLLM_VERSION=v0.32.0

FROM scratch AS files
COPY requirements.txt app.py config.py errors.py gpu.py instance_manager.py router.py /app/
COPY configuration /app/configuration
COPY instances /app/instances
COPY routing /app/routing
COPY web /app/web
COPY client /app/client

FROM python:3.12-slim AS router
COPY --from=files /app /app
RUN python3 -m venv /opt/vllm-server \
    && /opt/vllm-server/bin/pip install --no-cache-dir -r /app/requirements.txt /app/client \
    && ln -s /opt/vllm-server/bin/vllm-server /usr/local/bin/ \
    && useradd --system --uid 10001 --home-dir /data --create-home vllm-server
ENV STATE_DIR=/data/state HF_HOME=/data/huggingface
WORKDIR /app
USER 10001
VOLUME /data
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["sh", "-c", "vllm-server --url http://127.0.0.1:${APP_PORT:-5000} health"]
CMD ["/opt/vllm-server/bin/python", "app.py"]

FROM vllm/vllm-openai:${VLLM_VERSION} AS gpu
COPY --from=files /app /app
# The daemon's libraries lie beside vLLM's, not among them, and not before them on PATH.
RUN python3 -m venv /opt/vllm-server \
    && /opt/vllm-server/bin/pip install --no-cache-dir -r /app/requirements.txt /app/client \
    && ln -s /opt/vllm-server/bin/vllm-server /usr/local/bin/ \
    && useradd --system --uid 10001 --home-dir /data --create-home vllm-server
ENV STATE_DIR=/data/state HF_HOME=/data/huggingface
WORKDIR /app
USER 10001
VOLUME /data
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["sh", "-c", "vllm-server --url http://127.0.0.1:${APP_PORT:-5000} health"]
# The base image's entrypoint is vllm itself.
ENTRYPOINT []
CMD ["/opt/vllm-server/bin/python", "app.py"]
