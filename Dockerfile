# Modelpack's command line and gateway; with EXTRAS=engine,gateway,tokens the engine too (Linux, CPU).
#
#   docker build -t modelpack .
#   docker run --rm modelpack --version
#   docker run --rm -p 12435:12435 -v ./keys.toml:/keys.toml:ro modelpack \
#       gateway --host 0.0.0.0 --keys /keys.toml --upstream http://SERVER:12434
#
# What is installed is what requirements/image.lock has, by hash, or requirements/image-engine.lock for
# EXTRAS=engine,gateway,tokens; other EXTRAS have no lock file and take what pyproject.toml allows.
#
# BASE needs Python >= 3.11 as `python`, with venv and pip, and a shell. Nothing else of it is used,
# but that the engine's library for CPUs is compiled by g++, which apt-get installs if there is none.
# The digest is that of the tag in September 2026. Use --build-arg BASE=IMAGE@DIGEST for a newer one.

ARG BASE=python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM ${BASE} AS build
ARG EXTRAS=gateway,tokens
# Where pip installs from, for those who have an index of their own.
ARG PIP_INDEX_URL
COPY pyproject.toml README.md LICENSE /src/
COPY spec /src/spec
COPY modelpack /src/modelpack
COPY engine /src/engine
COPY scripts /src/scripts
COPY requirements /src/requirements
RUN case ",${EXTRAS}," in \
      *,engine,*) \
        if ! command -v g++ && command -v apt-get; then \
          apt-get update && apt-get install -y --no-install-recommends g++; \
        fi ;; \
      *) export MODELPACK_NATIVE=0 ;; \
    esac \
    && python -m venv /opt/build && python -m venv /opt/modelpack \
    && export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    && /opt/build/bin/python -m pip install --require-hashes --no-deps -r /src/requirements/build.lock \
    && /opt/build/bin/python -m pip wheel --no-deps --no-build-isolation -w /opt/wheel /src \
    && case "${EXTRAS}" in \
         gateway,tokens) lock=image ;; \
         engine,gateway,tokens) lock=image-engine ;; \
         *) lock= ;; \
       esac \
    && if [ -n "$lock" ]; then \
         /opt/modelpack/bin/python -m pip install --require-hashes --no-deps \
           -r "/src/requirements/$lock.lock" \
         && /opt/modelpack/bin/python -m pip install --no-deps /opt/wheel/*.whl; \
       else \
         /opt/modelpack/bin/python -m pip install "$(echo /opt/wheel/*.whl)[${EXTRAS}]"; \
       fi \
    && python -c "import os; os.makedirs('/state/store')"

FROM ${BASE}
COPY --from=build /opt/modelpack /opt/modelpack
# What the user of the image may write: the store, and what else is kept in a home directory.
COPY --from=build --chown=10001:10001 /state /var/lib/modelpack
ENV PATH=/opt/modelpack/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/modelpack \
    MODELPACK_STORE=/var/lib/modelpack/store \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/modelpack
VOLUME /var/lib/modelpack
ENTRYPOINT ["modelpack"]
CMD ["--help"]
