# belt on CPUs: workers, flow runs and, with the same Prefect, its server.
#
#   docker build --file deployments/docker/cpu.Dockerfile --tag belt:0.1.0-cpu .
#
# The tag of the base image names its Python in full; to hold it to the byte, add its digest
# (docker buildx imagetools inspect python:3.11.14-slim-trixie).
FROM python:3.11.14-slim-trixie AS build

# gcc compiles belt's attention kernel; it stays in this stage
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/belt
WORKDIR /src
COPY constraints.txt ./
# PyTorch's own index has the CPU build, without gigabytes of CUDA; the version is that of constraints.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/belt/bin/python install --no-deps \
    --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/belt/bin/python install --constraint constraints.txt '.[aws,kubernetes,metrics]'
# fails if the kernel was not compiled
RUN /opt/belt/bin/python -c "from belt_tasks.attention_cpu import load_kernel; assert load_kernel() is not None"

FROM python:3.11.14-slim-trixie

RUN groupadd --gid 10001 belt \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/belt --shell /usr/sbin/nologin belt \
    && install --directory --owner=belt --group=belt --mode=0750 /var/lib/belt
COPY --from=build /opt/belt /opt/belt
# all that is ever written lies in /var/lib/belt and /tmp, on disk: the rest may be read-only
ENV PATH=/opt/belt/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PREFECT_HOME=/var/lib/belt/prefect \
    HF_HOME=/var/lib/belt/huggingface \
    MPLCONFIGDIR=/var/lib/belt/matplotlib \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=1
WORKDIR /var/lib/belt
VOLUME ["/var/lib/belt", "/tmp"]
USER 10001:10001
# of a worker, which serves it where it is started --with-healthcheck
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
CMD ["prefect", "worker", "start", "--pool", "cpu", "--type", "process", "--with-healthcheck"]
