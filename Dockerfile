# The serving image: no PyTorch, no compiler, no package index; a non-root user; a health check.
#
#   docker build -t pinrank .
#   docker run -p 50051:50051 -p 9095:9095 -v ./models:/models:ro -v ./features:/features:ro \
#     -e PINRANK_MODEL=ml1m -e PINRANK_FEATURE_STORE=lmdb:///features -e PINRANK_INSECURE=true pinrank
#
# PINRANK_INSECURE=true is for a trusted network; else give it a certificate (docs/operations.md, "TLS").
#
# It runs with --read-only, as any --user, and within --cpus (docs/operations.md, "In a container").
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# For the native libraries; the serving image below gets them compiled.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnghttp2-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/pinrank
COPY pyproject.toml hatch_build.py constraints.txt README.md ./
COPY proto proto
COPY feature_client feature_client
COPY kernels kernels
COPY model_store model_store
COPY server server
COPY ranker ranker
COPY loadtest loadtest
RUN /opt/pinrank/bin/pip install --no-cache-dir -c constraints.txt '.[s3,signing,jwt,impressions]'

FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libnghttp2-14 && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home pinrank
COPY --from=build /opt/pinrank /opt/pinrank
ENV PATH=/opt/pinrank/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PINRANK_HOST=0.0.0.0 \
    PINRANK_LAME_DUCK_S=5 \
    PINRANK_MODEL_STORE=/models \
    PINRANK_LOG_FORMAT=json
USER pinrank
EXPOSE 50051 9095
HEALTHCHECK --interval=5s --timeout=2s --start-period=10m \
  CMD ["python", "-P", "-m", "server.cli.health"]
ENTRYPOINT ["pinrank"]
CMD ["serve"]
