# Look-alikes of the public base images, for a machine that reaches no image registry (tests/containers/bases.py builds
# them on a bare Debian and tags them with the public names). Never push them.
ARG BASE=world2act-lookalike/debian:bookworm

# python:3.11-slim-bookworm: Debian's Python 3.11 in place of one built from source, at the same path, without bytecode, too.
FROM ${BASE} AS python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.11 python3.11-venv libpython3.11 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /usr/share/doc /usr/share/man /usr/share/locale \
    && find /usr/lib/python3* -name '*.pyc' -delete \
    && for name in python python3 python3.11; do ln -s /usr/bin/python3.11 "/usr/local/bin/${name}"; done
CMD ["python3"]

# redis: Debian's package.
FROM ${BASE} AS redis
# hadolint ignore=DL3008
RUN groupadd --system --gid 999 redis && useradd --system --uid 999 --gid redis redis \
    && apt-get update && apt-get install -y --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* \
    && install -d -o redis -g redis /data
VOLUME /data
WORKDIR /data
CMD ["redis-server"]

# prom/prometheus: Debian's package, at that image's paths.
FROM ${BASE} AS prometheus
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/bin/prometheus /usr/bin/promtool /bin/ 2>/dev/null || true \
    && install -d -o nobody -g nogroup /prometheus /etc/prometheus
USER 65534:65534
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]

# NVIDIA's Triton: the server of the nvidia-pytriton wheel (the same release, 2.51, without GPU parts) at the official paths.
FROM python AS triton
ARG PYTRITON=nvidia-pytriton==0.7.0
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca_bundle,target=/etc/ssl/certs/ca-certificates.crt,required=false \
    python -m venv /tmp/venv && /tmp/venv/bin/pip install -q --no-deps --target /tmp/wheel "${PYTRITON}" \
    && mkdir -p /opt/tritonserver/backends \
    && cp -r /tmp/wheel/pytriton/tritonserver/bin /tmp/wheel/pytriton/tritonserver/caches /opt/tritonserver/ \
    && cp -r /tmp/wheel/pytriton/tritonserver/backends/python /opt/tritonserver/backends/ \
    && cp -r /tmp/wheel/nvidia_pytriton.libs /opt/tritonserver/lib \
    && echo /opt/tritonserver/lib > /etc/ld.so.conf.d/zz-triton.conf && ldconfig \
    && rm -rf /tmp/venv /tmp/wheel
ENV PATH=/opt/tritonserver/bin:${PATH}
WORKDIR /opt/tritonserver
