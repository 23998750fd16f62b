# The node's container: `ebi serve`. Run it privileged, with the host's /dev, /run/udev and /sys, its network namespace
# (uevents reach only that one) and its IPC namespace (udevd's semaphores are there), and with /var/lib/kubelet and
# /var/lib/ebi by bidirectional mount propagation. deploy/kubernetes does so.
FROM python:3.11-slim-bookworm AS builder
WORKDIR /src
COPY requirements/build.lock requirements/run.lock requirements/
RUN python -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes --requirement requirements/build.lock \
    && python -m venv --without-pip /opt/ebi \
    && /build/bin/pip --python /opt/ebi/bin/python install --no-cache-dir --require-hashes --requirement requirements/run.lock
COPY pyproject.toml README.md ./
COPY csi csi
COPY plugin plugin
RUN /build/bin/hatchling build --target wheel \
    && /build/bin/pip --python /opt/ebi/bin/python install --no-deps --no-index dist/*.whl

FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        btrfs-progs cryptsetup-bin dmsetup e2fsprogs kmod mount util-linux xfsprogs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /opt/ebi /opt/ebi
ENV PATH=/opt/ebi/bin:$PATH PYTHONUNBUFFERED=1
ENTRYPOINT ["ebi", "serve"]
