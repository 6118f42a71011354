# syntax=docker/dockerfile:1
# The image that the manifests in k8s/ run, and as `--target mlflow` the tracking server of k8s/mlflow.yaml:
#   docker build --tag medsynth:0.1.0 .
#   docker build --tag medsynth-mlflow:0.1.0 --target mlflow .
# PyTorch's own packages bring CUDA; the node's driver comes with NVIDIA's container runtime.

# The digest is that of the index of python:3.12-slim (Python 3.12.14, Debian 13). Another one:
#   docker buildx imagetools inspect python:3.12-slim --format '{{.Manifest.Digest}}'
ARG BASE=python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea

FROM ${BASE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=/opt/venv/bin:$PATH

FROM base AS build
RUN python -m venv /opt/venv
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY medsynth medsynth
COPY lightning_modules lightning_modules
COPY datamodules datamodules
COPY metrics metrics
COPY callbacks callbacks
COPY jobs jobs
RUN pip install .

FROM base AS build-mlflow
RUN python -m venv /opt/venv
# The client's bounds, from the one place where they stand, and the driver of PostgreSQL.
COPY pyproject.toml .
RUN pip install "$(python -c "import tomllib; \
    print(*[d for d in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if d.startswith('mlflow')])")" \
    'psycopg2-binary>=2.9,<3'

FROM base AS mlflow
COPY --from=build-mlflow /opt/venv /opt/venv
RUN useradd --uid 10001 --create-home medsynth
USER 10001
WORKDIR /tmp
ENTRYPOINT ["mlflow"]

FROM base AS train
# torch.compile has its kernels linked by a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 10001 --create-home medsynth
USER 10001
WORKDIR /medsynth
ENTRYPOINT []
CMD ["medsynth", "--help"]
