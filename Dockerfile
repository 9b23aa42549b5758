# World2Act's images, one target a service: docker build --target gateway -t world2act/gateway:0.1.0 .
#
# Each result holds a Python environment with the service's own extra of pyproject.toml (where all versions are pinned), the
# method, and that service's code; no compiler, no pip. It runs as user 10001 and writes nowhere but /tmp and /var/lib/world2act.
# Behind a package mirror: --secret id=pip_conf,src=... and --secret id=ca_bundle,src=... reach pip and stay out of the images.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:24.10-py3

# -- what all share ----------------------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS build
# The CPU build of torch; empty: the CUDA build, from PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
# pip lives apart, so that nothing has to be taken out of /opt/venv again.
RUN python -m venv /opt/pip && python -m venv --without-pip /opt/venv
COPY containers/install-extra /usr/local/bin/
# Only what names the dependencies, so that an edit of the code installs nothing again.
COPY pyproject.toml ./
COPY world2act/__init__.py world2act/
RUN touch README.md

# Torch and its like are installed once, for the services that use them.
FROM build AS method-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra method

FROM ${PYTHON_IMAGE} AS code
WORKDIR /opt/world2act
COPY world2act world2act
COPY services services
RUN python -m compileall -q --invalidation-mode unchecked-hash world2act services

FROM ${PYTHON_IMAGE} AS service
ARG VERSION=0.1.0
LABEL org.opencontainers.image.vendor="World2Act" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.documentation="docs/design.md"
RUN useradd --uid 10001 --no-create-home --home-dir /tmp world2act \
    && install -d -o world2act -g world2act /var/lib/world2act /var/lib/world2act/artifacts /var/lib/world2act/data /var/lib/world2act-token
COPY containers/healthy /usr/local/bin/
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    W2A_ZOO=/opt/world2act/zoo \
    W2A_RUN_DIR=/tmp/world2act \
    W2A_ARTIFACTS_URL=file:///var/lib/world2act/artifacts \
    W2A_DATA_ROOT=/var/lib/world2act/data
WORKDIR /opt/world2act
COPY --from=code /opt/world2act/world2act world2act
COPY --from=code /opt/world2act/services/__init__.py services/
COPY --from=code /opt/world2act/services/runtime services/runtime
USER 10001:10001

# -- gateway -----------------------------------------------------------------------------------------------------------

# Without bytecode, which would be a fifth of the image; a start takes two seconds of CPU more.
FROM build AS gateway-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra gateway --no-compile

FROM service AS gateway
LABEL org.opencontainers.image.title="World2Act gateway"
COPY --from=gateway-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/gateway services/gateway
EXPOSE 8080 9100
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9100", "/readyz"]
ENTRYPOINT ["python", "-m", "services.gateway"]

# -- segmenter ---------------------------------------------------------------------------------------------------------

FROM build AS segmenter-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra segmenter

FROM service AS segmenter
LABEL org.opencontainers.image.title="World2Act segmenter"
COPY --from=segmenter-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/segmenter services/segmenter
EXPOSE 9101
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9101", "/readyz"]
ENTRYPOINT ["python", "-m", "services.segmenter"]

# -- worldmodel: the imagination worker, without torch -------------------------------------------------------------------

FROM build AS worldmodel-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra worldmodel

FROM service AS worldmodel
LABEL org.opencontainers.image.title="World2Act imagination worker"
COPY --from=worldmodel-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/worldmodel services/worldmodel
EXPOSE 9102
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9102", "/readyz"]
ENTRYPOINT ["python", "-m", "services.worldmodel", "worker"]

# -- vla ---------------------------------------------------------------------------------------------------------------

FROM method-packages AS vla-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra vla,policies

FROM service AS vla
LABEL org.opencontainers.image.title="World2Act policy server"
COPY --from=vla-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/vla services/vla
COPY zoo zoo
EXPOSE 50051 9103
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9103", "/readyz"]
ENTRYPOINT ["python", "-m", "services.vla"]

# -- simulator ---------------------------------------------------------------------------------------------------------

FROM build AS simulator-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra simulator

FROM service AS rendering
USER 0
# Debian removes old versions from its mirrors: a version pinned here would not be found next month.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libosmesa6 libgl1 && rm -rf /var/lib/apt/lists/*
USER 10001:10001

FROM rendering AS simulator
LABEL org.opencontainers.image.title="World2Act simulator"
COPY --from=simulator-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/simulator services/simulator
EXPOSE 50061 9104
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9104", "/readyz"]
ENTRYPOINT ["python", "-m", "services.simulator"]

# -- trainer: the job runner; with the argument `rollout` the rollout coordinator ----------------------------------------

FROM method-packages AS trainer-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra trainer

FROM service AS trainer
LABEL org.opencontainers.image.title="World2Act trainer and rollout coordinator"
COPY --from=trainer-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/trainer services/trainer
COPY zoo zoo
EXPOSE 9105 9106
HEALTHCHECK --interval=5s --timeout=10s --start-period=300s CMD ["healthy", "9106", "/readyz"]
ENTRYPOINT ["python", "-m", "services.trainer"]

# -- cli: the main job as a client (and the scripted experts that record its demonstrations) ------------------------------

FROM build AS cli-packages
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    install-extra cli,simulator

FROM rendering AS cli
LABEL org.opencontainers.image.title="World2Act command line"
COPY --from=cli-packages /opt/venv /opt/venv
COPY --from=code /opt/world2act/services/cli services/cli
COPY --from=code /opt/world2act/services/simulator services/simulator
COPY zoo zoo
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "services.cli.main"]

# -- triton ------------------------------------------------------------------------------------------------------------

FROM method-packages AS triton-packages
ARG TRITON_EXTRAS=triton
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip install --no-deps --target /opt/pytriton \
      "$(sed -n 's/^triton-server = \["\(.*\)"\]/\1/p' pyproject.toml)" \
    && install-extra "${TRITON_EXTRAS}"

# NVIDIA's image has Python 3.10; its Python backend takes any version whose stub lies beside it. So Python 3.11 comes from the
# Python image (its glibc, Debian 12's, is newer than Ubuntu 22.04's, but no symbol that it uses is) and the stub from the wheel.
FROM ${PYTHON_IMAGE} AS python
FROM ${TRITON_IMAGE} AS triton
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="World2Act world model on Triton" \
      org.opencontainers.image.vendor="World2Act" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.documentation="docs/design.md"
COPY --from=python /usr/local /usr/local
RUN ldconfig && useradd --uid 10001 --no-create-home --home-dir /tmp world2act
COPY containers/healthy /usr/local/bin/
COPY --from=triton-packages /opt/pytriton/pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub \
     /opt/tritonserver/backends/python/
COPY --from=triton-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_NUM_THREADS=1 \
    W2A_TRITON_ROOT=/opt/tritonserver \
    W2A_ZOO=/opt/world2act/zoo \
    W2A_RUN_DIR=/tmp/world2act
WORKDIR /opt/world2act
COPY --from=code /opt/world2act/world2act world2act
COPY --from=code /opt/world2act/services/__init__.py services/
COPY --from=code /opt/world2act/services/runtime services/runtime
COPY --from=code /opt/world2act/services/worldmodel services/worldmodel
COPY zoo zoo
USER 10001:10001
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=5s --timeout=10s --start-period=600s CMD ["healthy", "8000", "/v2/health/ready"]
ENTRYPOINT ["python", "-m", "services.worldmodel", "triton"]
